"""From images to captions, from the folder that also draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from ..generation.captioning import can_caption, caption
from ..generation.sampling import Sampling, random_seed
from ..tokenization.processor import Tok2ImgProcessor
from .loading import batches, load_components, move


class ImageToTextPipeline:
    """A prior that has learned to caption, with its tokenizers: `ImageToTextPipeline.from_pretrained(folder)(["image.png"])`.

    Raises:
        ValueError: for a prior that has not.
    """

    def __init__(self, prior: PreTrainedModel, processor: Tok2ImgProcessor):
        if not can_caption(prior):
            raise ValueError(
                "this model has not learned to caption images: train one with `tok2img train-prior --image-to-text-fraction 0.5 ...`"
            )
        self.prior, self.processor = prior.eval(), processor

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a trained folder, or one of the hub by its name; ValueError for what is neither, or has not learned to caption."""
        return cls(*load_components(name))

    def to(self, *place: str | torch.device | torch.dtype) -> Self:
        """Move prior and image tokenizer to a device, and the prior to a type: `to("cuda", torch.bfloat16)`."""
        move(self.prior, self.processor, *place)
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
        """Caption an image or several: paths, bytes, PIL images.

        Args:
            temperature, top_k, top_p: as in `Sampling`; the likeliest caption by default.
            seed: caption i of a seed is the same in any batch; None draws a new seed.

        Raises:
            ValueError: for no image, one that does not decode, or a setting out of range.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        image_list: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        if not image_list:
            raise ValueError("images must be an image or a list of images, got none")
        seed = random_seed() if seed is None else seed
        captions = []
        for rows in batches(len(image_list), batch_size):
            codes = self.processor.encode_images(image_list[rows.start : rows.stop], rows=rows)
            text_ids = caption(
                self.prior, self.processor.layout, codes, sampling=sampling, seed=seed, indices=rows
            ).cpu()
            captions.extend(self.processor.decode_text(row) for row in text_ids)
        return captions
