"""Caption images with a model that was trained in both directions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from ..generation.captioning import can_caption, caption
from ..generation.sampling import Sampling, random_seed
from ..tokenization.processor import Tok2ImgProcessor
from .batching import batches
from .loading import load_components, move_to


class ImageToTextPipeline:
    """A prior that has learned to caption, with its tokenizers.

    Args:
        prior: A prior trained with `image_to_text_fraction` above 0.
        processor: The processor with text and image tokenizer.

    Raises:
        ValueError: If the prior has not learned to caption.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from tok2img import ImageToTextPipeline, SubwordTokenizer, Tok2ImgProcessor, build_prior
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> image_tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16)).eval()
        >>> text_tokenizer = SubwordTokenizer.train_bpe(["a red square"], vocab_size=300)
        >>> processor = Tok2ImgProcessor.build(image_tokenizer, text_tokenizer, text_length=6)
        >>> prior = build_prior(processor.layout, depth=1)
        >>> prior.generation_config.captions_images = True  # training sets this
        >>> captions = ImageToTextPipeline(prior, processor)(Image.new("RGB", (8, 8), "red"))
        >>> len(captions)
        1
    """

    def __init__(self, prior: PreTrainedModel, processor: Tok2ImgProcessor):
        if not can_caption(prior):
            raise ValueError(
                "this model has not learned to caption images: "
                "train one with `tok2img train-prior --image-to-text-fraction 0.5 ...`"
            )
        self.prior, self.processor = prior.eval(), processor

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a trained model.

        Args:
            name: A local folder, or the name of a repository on the hub.

        Raises:
            ValueError: If `name` is neither, or the model has not learned to caption.
        """
        return cls(*load_components(name))

    def to(self, *device_or_dtype: str | torch.device | torch.dtype) -> Self:
        """Move prior and image tokenizer to a device, and the prior to a dtype: `to("cuda", torch.bfloat16)`."""
        move_to(self.prior, self.processor, *device_or_dtype)
        return self

    def __call__(
        self,
        images: Any,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """Caption one image or several.

        Args:
            images: A path, bytes or PIL image, or a list of them.
            temperature: Softmax temperature; 0 is greedy.
            top_k: Sample from the k most likely tokens (0 = all).
            top_p: Sample from the smallest set of tokens whose total probability is at least p.
            seed: Caption i of a seed is the same in any batch. None: a new random seed.
            batch_size: Number of images captioned together.

        Returns:
            One caption per image.

        Raises:
            ValueError: If there is no image, one cannot be decoded, or a setting is out of range.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        image_list: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        if not image_list:
            raise ValueError("Expected an image or a list of images, got an empty list.")
        seed = random_seed() if seed is None else seed
        captions = []
        for rows in batches(len(image_list), batch_size):
            codes = self.processor.encode_images(image_list[rows.start : rows.stop], rows=rows)
            text_ids = caption(
                self.prior, self.processor.layout, codes, sampling=sampling, seed=seed, indices=rows
            ).cpu()
            captions.extend(self.processor.decode_text(row) for row in text_ids)
        return captions
