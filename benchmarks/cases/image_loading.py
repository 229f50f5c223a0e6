"""Load images: our loader against plain Pillow, and a normalized batch against the Pillow processor of transformers."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from tokenizers_vq.images.loading import load_image
from tokenizers_vq.images.processing import pixels_from_images

from ..harness import Case, Comparison

NUM_IMAGES = 64
MEAN = STD = 0.5


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare JPEGs of 256 and 512 pixels and PNGs of 256, and batches of some sizes from the JPEGs of 256."""
    num = 2 if tiny else NUM_IMAGES
    for image_format, side in (("JPEG", 256), ("JPEG", 512), ("PNG", 256)):
        files = encoded(num, 32 if tiny else side, image_format)
        cases = [Case("ours", partial(each, files, load_image)), Case("Pillow", partial(each, files, plain))]
        yield Comparison(f"{num} {image_format} files of {side} pixels -> RGB", cases, "Pillow")
    files = encoded(num, 32 if tiny else 256, "JPEG")
    for image_size in (64, 128, 256):
        cases = [
            Case("ours", partial(our_batch, files, image_size)),
            Case("transformers", partial(their_batch, files, their_processor(image_size))),
        ]
        yield Comparison(f"{num} JPEG files of 256 pixels -> batch of {image_size}", cases, "transformers")


def encoded(num: int, side: int, image_format: str) -> list[bytes]:
    """Create files of smooth images with some noise, about as large as those of photographs."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(num, 3, 16, 16, generator=generator), size=side, mode="bicubic")
    pixels = smooth + 0.03 * torch.randn(num, 3, side, side, generator=generator)
    levels = rearrange(pixels.clamp(0, 1) * 255, "b c h w -> b h w c").to(torch.uint8).numpy()
    return [as_file(array, image_format) for array in levels]


def as_file(levels: np.ndarray, image_format: str) -> bytes:
    """Encode an image `h w c` as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, image_format)
    return buffer.getvalue()


def each(files: list[bytes], load: Callable[[bytes], Image.Image]) -> None:
    """Load files one after another."""
    for data in files:
        load(data)


def plain(data: bytes) -> Image.Image:
    """Load an image as most code does, which gets some images wrong and hangs on others."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def our_batch(files: list[bytes], image_size: int) -> Tensor:
    """Load files as a normalized batch `b c h w`."""
    images = [load_image(data, min_side=2 * image_size) for data in files]
    pixels = pixels_from_images(images, image_size=image_size, num_channels=3)
    return (pixels - MEAN) / STD


def their_processor(image_size: int) -> Any:
    """Create the Pillow processor of transformers with the same steps.

    Resize the short side, center crop, normalize.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def their_batch(files: list[bytes], processor: Any) -> Tensor:
    """Load files as a normalized batch `b c h w`."""
    return processor([plain(data) for data in files], return_tensors="pt")["pixel_values"]
