"""Compare image tokenizers at equal bits per image and equal training time.

    python training/experiments/compare_tokenizers_at_equal_bits.py DATA SECONDS [BITS]

The tokenizers are one grid of codes, a residual quantizer, two grids (VQ-VAE-2), FSQ without a
codebook, and VQ-DRAW, at
BITS of 120 (the default) or 240. Each trains for SECONDS of CPU time with Muon on images of 32
pixels, in bfloat16 if the
processor has instructions for it. Prints for each, on held-out images:

- bits per image, and the squared error in pixels of [0, 1];
- the same error with a search for better codes: ten steps for a VQ-VAE, a beam of 4 for VQ-DRAW;
- the fraction of codes in use.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cpu_time_budget import train_for
from torch import Tensor

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tok2img.evaluation.metrics import evaluate_tokenizer
from tok2img.evaluation.reports import load_eval_split
from tok2img.trainer.muon import Muon, muon_parameters
from tokenizers_vq import VQVAE, DiscreteTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig

IMAGE_SIZE, BATCH_SIZE = 32, 32
ROWS_TO_START_FROM = 2000
SHARED: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "num_encoder_blocks": 2,
    "num_decoder_blocks": 2,
    "num_downsamples": 3,
    "search_steps": 10,
}
# By bits per image; a tokenizer has as many or slightly fewer.
VQVAES: dict[int, dict[str, dict[str, Any]]] = {
    120: {
        "one grid, 16 codes of 181": {"codebook_size": 181},
        "residual, 5 x 4 codes of 64": {
            "num_downsamples": 4,
            "quantizer": "residual",
            "num_quantizers": 5,
            "codebook_size": 64,
        },
        "two grids, 4 + 16 codes of 64": {"num_grids": 2, "codebook_size": 64},
        "FSQ, 16 codes of 180": {"quantizer": "fsq", "fsq_levels": [6, 6, 5]},
    },
    240: {
        "one grid, 16 codes of 32768": {"codebook_size": 32768},
        "one finer grid, 64 codes of 13": {"num_downsamples": 2, "codebook_size": 13},
        "residual, 2 x 16 codes of 181": {"quantizer": "residual", "num_quantizers": 2, "codebook_size": 181},
        "two grids, 16 + 64 codes of 8": {"num_downsamples": 2, "num_grids": 2, "codebook_size": 8},
        "FSQ, 16 codes of 32768": {"quantizer": "fsq", "fsq_levels": [8, 8, 8, 8, 8]},
    },
}
VQDRAW: dict[str, Any] = {"codebook_size": 64}
BITS_PER_STAGE = 6
LEARNING_RATES = {VQVAE: 1e-3, VQDrawForImages: 2e-3}


def builders(bits: int) -> dict[str, Callable[[], DiscreteTokenizer]]:
    """Return a function that builds each tokenizer, by name."""
    vqvaes: dict[str, Callable[[], DiscreteTokenizer]] = {
        name: partial(VQVAE, VQVAEConfig(**SHARED | settings)) for name, settings in VQVAES[bits].items()
    }
    num_stages = bits // BITS_PER_STAGE
    config = VQDrawImageConfig(image_size=IMAGE_SIZE, num_stages=num_stages, **VQDRAW)
    return vqvaes | {f"VQ-DRAW, {num_stages} codes of 64": partial(VQDrawForImages, config)}


def searched_error(model: DiscreteTokenizer, pixel_values: Tensor) -> float:
    """Return the mean squared error of images `b c h w` with the codes that a data set would be tokenized to."""
    errors = [model.decode(model.encode_with_search(some)) - some for some in pixel_values.split(100)]
    return torch.cat(errors).square().mean().item()


def main(data: str, seconds: float, bits: int = 120, *, max_samples: int = 1000) -> dict[str, dict[str, Any]]:
    """Train all tokenizers one after another, and print a line for each."""
    reader = VQVAE(VQVAEConfig(**SHARED))
    rows = load_captioned_images(data, split="train", with_captions=False)
    unseen = load_eval_split(data, with_captions=False, max_samples=max_samples)
    pixels, test = (load_pixels(each["image"][:], reader) for each in (rows, unseen))
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    reports: dict[str, dict[str, Any]] = {}
    for name, build in builders(bits).items():
        torch.manual_seed(0)
        model = build()
        steps = train_for(
            model,
            pixels,
            seconds=seconds,
            learning_rate=LEARNING_RATES[type(model)],
            batch_size=BATCH_SIZE,
            num_init_examples=ROWS_TO_START_FROM,
            bf16=torch.cpu._is_avx512_bf16_supported(),
            optimizer=Muon(model.parameters(), muon_params=muon_parameters(model)),
        )
        report = evaluate_tokenizer(model.eval(), test.split(100))
        reports[name] = {"steps": steps, "mse_searched": searched_error(model, test), **report}
        print(
            f"{name:34} {report['bits_per_image']:6.0f} bits  MSE {report['mse']:.5f}"
            f"  searched {reports[name]['mse_searched']:.5f}  codes in use {report['code_usage']:.2f}"
            f"  {steps} steps",
            flush=True,
        )
    return reports


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], *([str(bits)] for bits in VQVAES)):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
