"""Load images for an image tokenizer."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer, load_image
from tokenizers_vq.images.processing import pixels_from_uint8, uint8_from_images


def load_pixels(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """Images in any form -> `b c h w` of the size and channels that a tokenizer reads; errors as in `load_images`."""
    return pixels_from_uint8(load_uint8(images, image_tokenizer, rows=rows))


def load_uint8(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """The same as bytes, `b c h w` uint8."""
    return resize_to_uint8(load_images(images, rows=rows, fit_for=image_tokenizer), image_tokenizer)


def resize_to_uint8(images: list[Image.Image], image_tokenizer: DiscreteTokenizer) -> Tensor:
    """Upright RGB images -> `b c h w` uint8 of the size and channels that a tokenizer reads."""
    config: Any = image_tokenizer.config
    return uint8_from_images(images, image_size=config.image_size, num_channels=config.num_channels)


def load_images(
    images: Sequence[Any], *, rows: Sequence[int] | None = None, fit_for: DiscreteTokenizer | None = None
) -> list[Image.Image]:
    """Images in any form, upright and RGB.

    Args:
        fit_for: an image tokenizer that is to read them; large JPEGs are then read at twice its size or a little more.

    Raises:
        ValueError: for an image that does not decode, with its number (that of `rows`, or its place in the list).
    """
    config: Any = fit_for.config if fit_for else None
    min_side = 2 * config.image_size if config else None
    loaded = []
    for row, image in zip(rows or range(len(images)), images, strict=True):
        try:
            loaded.append(load_image(image, min_side=min_side))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
    return loaded
