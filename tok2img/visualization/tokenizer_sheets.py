"""Sheets that show what a tokenizer does: reconstructions, progressive decoding, random codes."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.images.processing import images_from_pixels

from ..data.images import load_pixels
from .image_sheets import make_reconstruction_sheet, make_stage_sheet
from .text_sheets import render_text_stages

NUM_SAMPLES = 16
MAX_STAGE_COLUMNS = 8


def render_held_out(tokenizer: DiscreteTokenizer, held_out: Dataset) -> Image.Image | str:
    """Render reconstructions of the first held-out images, or for a text tokenizer of the first captions as text."""
    if isinstance(tokenizer, TextSpanTokenizer):
        return render_text_stages(tokenizer, held_out["caption"][:NUM_SAMPLES])
    return render_reconstructions(tokenizer, held_out["image"][:NUM_SAMPLES])


def render_reconstructions(image_tokenizer: DiscreteTokenizer, images: Sequence[Any]) -> Image.Image:
    """Render a sheet of images above their reconstructions."""
    pixel_values = load_pixels(images, image_tokenizer).to(image_tokenizer.device)
    reconstructions = image_tokenizer.decode(image_tokenizer.encode(pixel_values))
    return make_reconstruction_sheet(images_from_pixels(pixel_values.cpu()), images_from_pixels(reconstructions.cpu()))


def decode_images_by_stage(image_tokenizer: DiscreteTokenizer, codes: torch.Tensor) -> list[list[Image.Image]]:
    """Decode codes progressively.

    Args:
        image_tokenizer: The tokenizer.
        codes: Codes, `b n`.

    Returns:
        For each stage, the `b` images after it.
    """
    return [
        images_from_pixels(stage.cpu())
        for stage in image_tokenizer.decode_progressively(codes.to(image_tokenizer.device))
    ]


def render_stages(image_tokenizer: DiscreteTokenizer, codes: torch.Tensor) -> Image.Image:
    """Render a sheet of progressive decoding, with at most `MAX_STAGE_COLUMNS` columns.

    Args:
        image_tokenizer: The tokenizer.
        codes: Codes, `b n`; one row of the sheet for each.
    """
    stages = decode_images_by_stage(image_tokenizer, codes)
    columns = min(MAX_STAGE_COLUMNS, len(stages))
    # Geometric spacing, because the first stages change an image most.
    shown = sorted({round(len(stages) ** (column / max(1, columns - 1))) for column in range(columns)})
    num_codes = list(accumulate(image_tokenizer.positions_per_codebook))[-len(stages) :]
    rows = list(zip(*(stages[count - 1] for count in shown), strict=True))
    return make_stage_sheet(rows, num_codes=[num_codes[count - 1] for count in shown])


def sample_random_codes(
    image_tokenizer: DiscreteTokenizer, num_images: int, *, seed: int | None = None
) -> torch.Tensor:
    """Sample uniformly random codes, which show a tokenizer's images without a prior.

    Args:
        image_tokenizer: The tokenizer.
        num_images: Number of rows of codes.
        seed: Seed; None: random.

    Returns:
        Codes, `b n` int64.
    """
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    return torch.randint(image_tokenizer.codebook_size, (num_images, image_tokenizer.num_codes), generator=generator)
