"""Sheets of what models make: of images, of codes and of captions."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.images.processing import images_from_pixels

from ..data.images import load_pixels
from .image_sheets import reconstruction_sheet, stage_sheet
from .text_sheets import text_sheet

NUM_SAMPLES = 16
STAGES_SHOWN = 8


def draw_held_out(tokenizer: DiscreteTokenizer, held_out: Dataset) -> Image.Image | str:
    """What becomes of a few held-out images, or captions."""
    if isinstance(tokenizer, TextSpanTokenizer):
        return text_sheet(tokenizer, held_out["caption"][:NUM_SAMPLES])
    return reconstructions_sheet(tokenizer, held_out["image"][:NUM_SAMPLES])


def reconstructions_sheet(image_tokenizer: DiscreteTokenizer, images: Sequence[Any]) -> Image.Image:
    """A sheet of images above what becomes of them."""
    pixel_values = load_pixels(images, image_tokenizer).to(image_tokenizer.device)
    reconstructions = image_tokenizer.decode(image_tokenizer.encode(pixel_values))
    return reconstruction_sheet(images_from_pixels(pixel_values.cpu()), images_from_pixels(reconstructions.cpu()))


def images_by_stage(image_tokenizer: DiscreteTokenizer, codes: torch.Tensor) -> list[list[Image.Image]]:
    """Images of codes `b n` after each of the codes that changes them: stage by stage, `b` at each."""
    return [
        images_from_pixels(stage.cpu())
        for stage in image_tokenizer.decode_progressively(codes.to(image_tokenizer.device))
    ]


def stages_sheet(image_tokenizer: DiscreteTokenizer, codes: torch.Tensor) -> Image.Image:
    """A sheet of what codes `b n` show after the first of them, the second and so on, `STAGES_SHOWN` columns at most."""
    stages = images_by_stage(image_tokenizer, codes)
    columns = min(STAGES_SHOWN, len(stages))
    shown = sorted({round(len(stages) ** (column / max(1, columns - 1))) for column in range(columns)})
    num_codes = list(accumulate(image_tokenizer.positions_per_codebook))[-len(stages) :]
    rows = list(zip(*(stages[count - 1] for count in shown), strict=True))
    return stage_sheet(rows, num_codes=[num_codes[count - 1] for count in shown])


def random_codes(image_tokenizer: DiscreteTokenizer, num_images: int, *, seed: int | None = None) -> torch.Tensor:
    """Codes `b n` drawn evenly: what a tokenizer's images look like before any prior."""
    generator = torch.Generator()
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    return torch.randint(image_tokenizer.codebook_size, (num_images, image_tokenizer.num_codes), generator=generator)
