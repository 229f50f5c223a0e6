"""Loads images for an image tokenizer."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer, load_image
from tokenizers_vq.images.processing import pixels_from_uint8, uint8_from_images


def load_pixels(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """Load images as pixels `b c h w` of a tokenizer's size and channels; errors as in `load_images`."""
    return pixels_from_uint8(load_uint8(images, image_tokenizer, rows=rows))


def load_uint8(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """Load images as uint8 `b c h w` of a tokenizer's size and channels; errors as in `load_images`."""
    return resize_to_uint8(load_images(images, rows=rows, fit_for=image_tokenizer), image_tokenizer)


def resize_to_uint8(images: list[Image.Image], image_tokenizer: DiscreteTokenizer) -> Tensor:
    """Resize upright RGB images to uint8 `b c h w` of a tokenizer's size and channels."""
    config: Any = image_tokenizer.config
    return uint8_from_images(images, image_size=config.image_size, num_channels=config.num_channels)


def load_images(
    images: Sequence[Any], *, rows: Sequence[int] | None = None, fit_for: DiscreteTokenizer | None = None
) -> list[Image.Image]:
    """Load images of any form as upright RGB.

    Args:
        images: Paths, bytes, PIL images, or undecoded cells of a data set.
        rows: Numbers of the images, for errors; by default their positions.
        fit_for: Image tokenizer that will read them. Large JPEGs are then decoded at about twice its size.

    Raises:
        ValueError: If an image does not decode; names its row.
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
