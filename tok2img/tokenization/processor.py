"""Converts captions and images to the ids that the prior reads, and its image codes back to images."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.auto import load_image_tokenizer
from tokenizers_vq.images.processing import images_from_pixels

from ..data.images import load_pixels
from .layout import SequenceLayout
from .span_text_tokenizer import load_text_tokenizer
from .text_tokenizer import TextTokenizer

IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
TEXT_TOKENIZER_FOLDER = "text_tokenizer"
IGNORED_LABEL = -100
# Config fields about where a model is stored and who wrote it. They do not change codes, so the
# fingerprint leaves them out.
NON_CODE_FIELDS = {"_name_or_path", "transformers_version", "architectures", "dtype", "checkpoint_stages"}
# Later settings and their neutral values, which the fingerprint leaves out: tokens made before keep theirs.
NEUTRAL_SETTINGS = {"encode_dtype": "float32", "search_steps": 0}


class Tok2ImgProcessor:
    """Image tokenizer, text tokenizer, and the layout that joins them into one vocabulary.

    Args:
        image_tokenizer: images <-> codes.
        text_tokenizer: captions <-> text ids.
        layout: how both make one sequence; it must fit the two, but may keep more ids for text
            than the text tokenizer has, as language
            models do, and may have ids of their own for codes of every position, see `AxialPositionEmbeddings`.

    Example:
        >>> import torch
        >>> from tok2img import SubwordTokenizer, Tok2ImgProcessor
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> config = VQVAEConfig(image_size=8, hidden_channels=8, num_decoder_blocks=1, codebook_size=4, code_dim=2)
        >>> model = VQVAE(config)
        >>> text_tokenizer = SubwordTokenizer.train_bpe(["a red circle"], vocab_size=260)
        >>> processor = Tok2ImgProcessor.build(model, text_tokenizer, text_length=8)
        >>> processor(text=["a red circle"])["input_ids"].shape  # [BOS], 8 text ids, [SEP]
        torch.Size([1, 10])
        >>> processor.layout.num_codes
        4
    """

    def __init__(self, image_tokenizer: DiscreteTokenizer, text_tokenizer: TextTokenizer, layout: SequenceLayout):
        text_vocab_size = max(layout.text_vocab_size, text_tokenizer.vocab_size)
        fitting = SequenceLayout.for_tokenizers(
            image_tokenizer, text_vocab_size=text_vocab_size, text_length=layout.text_length
        )
        if layout not in (fitting, fitting.with_position_specific_ids()):
            raise ValueError(f"these tokenizers need {fitting}, got {layout}")
        self.image_tokenizer, self.text_tokenizer, self.layout = image_tokenizer.eval(), text_tokenizer, layout

    @classmethod
    def build(
        cls,
        image_tokenizer: DiscreteTokenizer,
        text_tokenizer: TextTokenizer,
        *,
        text_length: int,
        text_vocab_size: int = 0,
    ) -> Self:
        """Build a processor with the layout that fits both tokenizers.

        Args:
            text_vocab_size: ids kept for text; 0: as many as the text tokenizer has.
        """
        layout = SequenceLayout.for_tokenizers(
            image_tokenizer, text_vocab_size=text_vocab_size or text_tokenizer.vocab_size, text_length=text_length
        )
        return cls(image_tokenizer, text_tokenizer, layout)

    def with_layout(self, layout: SequenceLayout) -> Self:
        """Return a processor with the same tokenizers and another layout that fits them."""
        return type(self)(self.image_tokenizer, self.text_tokenizer, layout)

    def decode_text(self, text_ids: Tensor) -> str:
        """Return the caption that text ids `t` stand for; padding is left out."""
        return self.text_tokenizer.decode([int(each) for each in text_ids if each != self.layout.pad_id])

    def __call__(self, text: str | list[str] | None = None, images: Any = None) -> BatchFeature:
        """Convert captions, with or without images, to ids.

        Returns:
            `input_ids` `b s`: the prompt up to [SEP], or the whole sequence when there are images;
            then also `labels` `b s`, which
            leave out [BOS], [SEP] and [PAD].
        """
        captions = [text] if isinstance(text, str) else list(text or [])
        if images is None:
            return BatchFeature({"input_ids": self.layout.prompt(self.encode_text(captions))})
        image_list = images if isinstance(images, list | tuple) else [images]
        captions = captions or [""] * len(image_list)
        if len(captions) != len(image_list):
            raise ValueError(f"got {len(captions)} captions for {len(image_list)} images")
        input_ids = self.layout.sequence(self.encode_text(captions), self.encode_images(image_list))
        unlearned = torch.tensor([self.layout.bos_id, self.layout.sep_id, self.layout.pad_id])
        return BatchFeature(
            {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.isin(input_ids, unlearned), IGNORED_LABEL)}
        )

    def encode_text(self, captions: list[str], *, rows: Sequence[int] | None = None) -> Tensor:
        """Captions -> text ids `b t`, cut or filled with [PAD] to the layout's text length.

        `rows` are their numbers in errors.
        """
        ids = self.text_tokenizer.encode(captions, max_length=self.layout.text_length, rows=rows)
        return torch.from_numpy(self.layout.pad_text(ids).astype(np.int64))

    def count_truncated(self, captions: list[str]) -> int:
        """Count the captions that are longer than the layout's text length."""
        lengths = self.text_tokenizer.lengths(captions, max_length=self.layout.text_length)
        return sum(length > self.layout.text_length for length in lengths)

    def encode_images(self, images: Sequence[Any], *, rows: Sequence[int] | None = None) -> Tensor:
        """Images (paths, bytes, PIL images, data set rows) -> codes `b n`, on the CPU.

        `rows` are their numbers in errors.
        """
        return self.encode_pixels(load_pixels(images, self.image_tokenizer, rows=rows))

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        """Encode pixels `b c h w` of the tokenizer's size to codes `b n` on the CPU."""
        return self.image_tokenizer.encode_with_search(pixel_values.to(self.image_tokenizer.device)).cpu()

    def decode_images(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes `b n` to images."""
        return images_from_pixels(self.image_tokenizer.decode(codes.to(self.image_tokenizer.device)).cpu())

    def fingerprint(self) -> str:
        """Return a sha256 of everything that the tokens depend on: weights, config, text tokenizer and layout."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.image_tokenizer.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        settings = {
            key: value
            for key, value in self.image_tokenizer.config.to_dict().items()
            if key not in NON_CODE_FIELDS and (key, value) not in NEUTRAL_SETTINGS.items()
        }
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update(self.text_tokenizer.state())
        digest.update(repr(self.layout).encode())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `layout.json`, `image_tokenizer/` and `text_tokenizer/` into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.image_tokenizer.save_pretrained(str(Path(folder, IMAGE_TOKENIZER_FOLDER)))
        self.text_tokenizer.save_pretrained(Path(folder, TEXT_TOKENIZER_FOLDER))
        self.layout.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a processor that `save_pretrained` wrote; ValueError if something is missing or damaged."""
        layout = SequenceLayout.from_pretrained(folder)
        image_tokenizer = load_image_tokenizer(Path(folder, IMAGE_TOKENIZER_FOLDER))
        return cls(image_tokenizer, load_text_tokenizer(Path(folder, TEXT_TOKENIZER_FOLDER)), layout)
