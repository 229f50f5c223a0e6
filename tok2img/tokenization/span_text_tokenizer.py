"""Adapts discrete text models (`VQDrawForText`, `VQVAEForText`) to the interface of text tokenizers.

id = stage (or quantizer) * codebook_size + code. All stages of the first span come first, then
those of the second, up to
the span in which the text ends.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load, save

from tokenizers_vq import TextSpanTokenizer, VQDrawForText, VQDrawTextConfig, VQVAEForText, VQVAETextConfig
from tokenizers_vq.base import own_fields
from tokenizers_vq.loading import CONFIG_FILE, read_json

from .text_tokenizer import SubwordTokenizer, TextTokenizer, check_texts

BATCH_SIZE = 64
TEXT_MODELS = {"vqdraw_text": (VQDrawForText, VQDrawTextConfig), "vqvae_text": (VQVAEForText, VQVAETextConfig)}
MODELS_BY_TYPE = {classes[1].model_type: classes for classes in TEXT_MODELS.values()}


class DiscreteTextTokenizer:
    """Adapts a `VQDrawForText` or `VQVAEForText` to `TextTokenizer`.

    Example:
        >>> from tok2img import DiscreteTextTokenizer
        >>> from tokenizers_vq import VQVAEForText, VQVAETextConfig
        >>> model = VQVAEForText(VQVAETextConfig(max_length=12, codebook_size=4))
        >>> tokenizer = DiscreteTextTokenizer(model)
        >>> [len(ids) for ids in tokenizer.encode(["abc", "a"])] == tokenizer.lengths(["abc", "a"], max_length=12)
        True
    """

    def __init__(self, model: TextSpanTokenizer):
        self.model = model.eval()

    @property
    def vocab_size(self) -> int:
        """Number of ids: a range for each stage."""
        return self.model.code_shape[0] * self.model.codebook_size

    def encode(
        self, captions: list[str], *, max_length: int | None = None, rows: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Encode captions to ids.

        Args:
            captions: Captions. Equal ones are encoded once.
            max_length: Largest number of ids kept of a caption. None = all.
            rows: Row numbers of the captions, for errors.

        Raises:
            ValueError: For a caption that is not text, with its row.
        """
        check_texts(captions, rows)
        different = list(dict.fromkeys(captions))
        batches = (different[first : first + BATCH_SIZE] for first in range(0, len(different), BATCH_SIZE))
        ids = dict(zip(different, chain.from_iterable(map(self._encode, batches)), strict=True))
        return [ids[caption][:max_length] for caption in captions]

    def _encode(self, captions: list[str]) -> Iterator[list[int]]:
        """Encode one batch of captions to ids."""
        symbols = self.model.texts_to_symbols(captions)
        codes = self.model.encode(symbols).cpu() + self._offsets()
        by_span = rearrange(codes, "b (n s) -> b (s n)", s=self.model.num_spans)
        lengths = self.model.code_shape[0] * self.model.valid_spans(symbols).sum(dim=1)
        return (row[:length] for row, length in zip(by_span.tolist(), lengths.tolist(), strict=True))

    @property
    def max_ids(self) -> int:
        """Largest number of ids of a caption."""
        return self.model.num_codes

    def lengths(self, captions: list[str], *, max_length: int) -> list[int]:
        """Return the number of ids of each caption, counted without encoding it.

        A caption that the model truncates counts in full.
        """
        del max_length
        return [self.model.code_shape[0] * self.model.count_spans(caption) for caption in captions]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text. Unknown ids, and ids at a wrong position, are a ValueError."""
        num_stages, num_spans = self.model.code_shape
        if len(ids) > self.model.num_codes:
            raise ValueError(f"got {len(ids)} ids, expected {self.model.num_codes} at most")
        filled = torch.tensor([*ids, *(0 for _ in range(self.model.num_codes - len(ids)))])
        codes = rearrange(filled, "(s n) -> 1 (n s)", s=num_spans, n=num_stages) - self._offsets()
        is_given = rearrange(torch.arange(self.model.num_codes) < len(ids), "(s n) -> 1 (n s)", s=num_spans)
        return self.model.decode(codes.where(is_given, 0).to(self.model.device))[0]

    def state(self) -> bytes:
        """Serialize settings and weights, everything that the ids depend on."""
        config = self.model.config
        settings = {name: getattr(config, name) for name in sorted(own_fields(type(config)))}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.model.state_dict().items())}
        return json.dumps(settings).encode() + b"\0" + save(weights)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        self.model.save_pretrained(str(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return text_tokenizer_of, (self.model.config.model_type, self.state())

    def _offsets(self) -> torch.Tensor:
        """Return the id of code 0 at each position, `(n s)`."""
        num_stages, num_spans = self.model.code_shape
        return (torch.arange(num_stages) * self.model.codebook_size).repeat_interleave(num_spans)


def text_tokenizer_of(model_type: str, state: bytes) -> DiscreteTextTokenizer:
    """Rebuild a `DiscreteTextTokenizer` from its model's type and its `state`."""
    model_class, config_class = MODELS_BY_TYPE[model_type]
    settings, _, weights = state.partition(b"\0")
    model = model_class(config_class(**json.loads(settings)))
    model.load_state_dict(load(weights))
    return DiscreteTextTokenizer(model)


def load_text_tokenizer(name: str | Path) -> TextTokenizer:
    """Load any saved text tokenizer from a folder or the hub; ValueError if there is none.

    Example:
        >>> import tempfile
        >>> from tok2img import SubwordTokenizer, load_text_tokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SubwordTokenizer.train_bpe(["a red circle"], vocab_size=260).save_pretrained(folder)
        ...     load_text_tokenizer(folder).decode(load_text_tokenizer(folder).encode(["a red circle"])[0])
        'a red circle'
    """
    if is_text_model(name):
        return DiscreteTextTokenizer(load_text_model(name))
    return SubwordTokenizer.from_pretrained(name)


def is_text_model(folder: str | Path) -> bool:
    """Return True if a folder contains a discrete text model."""
    return model_type_of(folder) in MODELS_BY_TYPE


def load_text_model(folder: str | Path) -> TextSpanTokenizer:
    """Load a discrete text model of either kind in eval mode; ValueError if the folder has none."""
    model_type = model_type_of(folder)
    if model_type not in MODELS_BY_TYPE:
        raise ValueError(
            f"{folder} holds no model of text; `tok2img train-tokenizer --tokenizer vqdraw_text` makes one"
        )
    model_class, _ = MODELS_BY_TYPE[model_type]
    return model_class.from_pretrained(folder).eval()


def model_type_of(folder: str | Path) -> str:
    """Return the `model_type` of a folder's config; "" if it cannot be read."""
    try:
        return str(read_json(Path(folder, CONFIG_FILE)).get("model_type"))
    except (OSError, ValueError):
        return ""
