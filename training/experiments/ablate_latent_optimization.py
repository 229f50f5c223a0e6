"""Ablate the latent optimization of a VQ-VAE: its gain in reconstruction error, and its cost.

    python training/experiments/ablate_latent_optimization.py DATA ROWS MODEL

Runs on the first ROWS images of the test split of DATA, with 0 steps (the encoder's own codes) to 20. Prints for each:

- the mean squared error in pixels of [0, 1], and its ratio to that without optimization;
- the fraction of codes that change;
- CPU milliseconds per image, on one thread.
"""

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tokenizers_vq import VQVAE
from tokenizers_vq.auto import load_image_tokenizer

SEARCH_STEPS = 0, 1, 3, 10, 20
BATCH_SIZE = 250


@dataclass
class Searched:
    """Codes `b n`, squared error of each image `b`, and CPU seconds for all images."""

    codes: Tensor
    errors: Tensor
    seconds: float


@torch.no_grad()
def measure(model: VQVAE, pixel_values: Tensor, search_steps: int) -> Searched:
    """Encode images `b c h w` with a number of optimization steps, and measure the result."""
    codes, errors, seconds = [], [], 0.0
    for batch in pixel_values.split(BATCH_SIZE):
        started = time.process_time()
        codes.append(model.encode(batch, search_steps=search_steps))
        seconds += time.process_time() - started
        errors.append((model.decode(codes[-1]) - batch).square().mean(dim=(1, 2, 3)))
    return Searched(torch.cat(codes), torch.cat(errors), seconds)


def main(data: str, num_rows: int, path: str) -> None:
    """Print a line for each number of steps."""
    model = load_image_tokenizer(path)
    if not isinstance(model, VQVAE):
        raise SystemExit(f"{path} contains a {type(model).__name__}, not a VQVAE")
    rows = load_captioned_images(data, split="test", with_captions=False, max_samples=num_rows)
    pixel_values = load_pixels(rows["image"][:], model)
    plain = measure(model, pixel_values, 0)
    for search_steps in SEARCH_STEPS:
        found = measure(model, pixel_values, search_steps) if search_steps else plain
        share, others = found.errors.mean() / plain.errors.mean(), (found.codes != plain.codes).float().mean()
        milliseconds = 1000 * found.seconds / len(pixel_values)
        print(
            f"steps {search_steps:2}  error {found.errors.mean():.6f}  {share:.3f}  changed codes {others:.3f}  {milliseconds:6.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
