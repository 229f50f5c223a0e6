"""Image tokenizers of the same bits a picture and the same training time side by side: how near their pictures come.

    python training/equal_bits.py DATA SECONDS

One grid of codes, a residual quantizer on a grid half as fine, two grids (VQ-VAE-2), no codebook (FSQ) and VQ-DRAW; each trains for so
many CPU seconds on pictures of 32 pixels. Prints bits, squared error in pixels of [0, 1] and the share of codes in use on unseen pictures.
"""

import sys
from typing import Any

import torch
from timed import train_for

from tok2img.data import load_captioned_images
from tok2img.evaluation import evaluate_tokenizer
from tok2img.processing import load_pixels
from tok2img.reports import open_unseen
from tokenizers_vq import VQVAE, DiscreteTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig

IMAGE_SIZE, BATCH_SIZE = 32, 32
ROWS_TO_START_FROM = 2000
SHARED: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "num_encoder_blocks": 2,
    "num_decoder_blocks": 2,
    "num_downsamples": 3,
}
# 120 bits each, or a little less.
VQVAES: dict[str, dict[str, Any]] = {
    "one grid, 16 codes of 181": {"codebook_size": 181},
    "residual, 5 x 4 codes of 64": {
        "num_downsamples": 4,
        "quantizer": "residual",
        "num_levels": 5,
        "codebook_size": 64,
    },
    "two grids, 4 + 16 codes of 64": {"num_grids": 2, "codebook_size": 64},
    "FSQ, 16 codes of 180": {"quantizer": "fsq", "fsq_levels": [6, 6, 5]},
}
VQDRAWS: dict[str, dict[str, Any]] = {"VQ-DRAW, 20 codes of 64": {"num_stages": 20, "codebook_size": 64}}
LEARNING_RATES = {VQVAE: 1e-3, VQDrawForImages: 2e-3}


def build(name: str) -> DiscreteTokenizer:
    """A model with fresh weights."""
    torch.manual_seed(0)
    if name in VQVAES:
        return VQVAE(VQVAEConfig(**SHARED | VQVAES[name]))
    return VQDrawForImages(VQDrawImageConfig(image_size=IMAGE_SIZE, **VQDRAWS[name]))


def main(data: str, seconds: float, *, max_rows: int = 1000) -> dict[str, dict[str, Any]]:
    """Train all, one after the other, and print a line each."""
    reader = build(next(iter(VQVAES)))
    rows = load_captioned_images(data, split="train", with_captions=False)
    unseen = open_unseen(data, with_captions=False, max_rows=max_rows)
    pixels, test = (load_pixels(each["image"][:], reader) for each in (rows, unseen))
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    reports: dict[str, dict[str, Any]] = {}
    for name in [*VQVAES, *VQDRAWS]:
        model = build(name)
        steps = train_for(
            model,
            pixels,
            seconds=seconds,
            learning_rate=LEARNING_RATES[type(model)],
            batch_size=BATCH_SIZE,
            rows_to_start_from=ROWS_TO_START_FROM,
        )
        report = evaluate_tokenizer(model.eval(), test.split(100))
        reports[name] = {"steps": steps, **report}
        print(
            f"{name:34} {report['bits_per_picture']:6.0f} bits  MSE {report['mse']:.5f}  codes in use {report['code_usage']:.2f}"
            f"  {steps} steps",
            flush=True,
        )
    return reports


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], float(sys.argv[2]))
