"""Load images for an image tokenizer."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer, load_image
from tokenizers_vq.images.processing import levels_from_images, pixels_from_levels


def load_pixels(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """Pictures in any form -> `b c h w` of the size and channels that a tokenizer reads; errors as in `load_images`."""
    return pixels_from_levels(load_levels(images, image_tokenizer, rows=rows))


def load_levels(
    images: Sequence[Any], image_tokenizer: DiscreteTokenizer, *, rows: Sequence[int] | None = None
) -> Tensor:
    """The same as bytes, `b c h w` uint8."""
    return fit_levels(load_images(images, rows=rows, fit_for=image_tokenizer), image_tokenizer)


def fit_levels(pictures: list[Image.Image], image_tokenizer: DiscreteTokenizer) -> Tensor:
    """Upright RGB pictures -> `b c h w` uint8 of the size and channels that a tokenizer reads."""
    config: Any = image_tokenizer.config
    return levels_from_images(pictures, image_size=config.image_size, num_channels=config.num_channels)


def load_images(
    images: Sequence[Any], *, rows: Sequence[int] | None = None, fit_for: DiscreteTokenizer | None = None
) -> list[Image.Image]:
    """Pictures in any form, upright and RGB.

    Args:
        fit_for: an image tokenizer that is to read them; large JPEGs are then read at twice its size or a little more.

    Raises:
        ValueError: for a picture that does not decode, with its number (that of `rows`, or its place in the list).
    """
    config: Any = fit_for.config if fit_for else None
    least_side = 2 * config.image_size if config else None
    pictures = []
    for row, image in zip(rows or range(len(images)), images, strict=True):
        try:
            pictures.append(load_image(image, least_side=least_side))
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
    return pictures
