"""Ablate the beam size of VQ-DRAW encoders: reconstruction error and encoding time.

    python training/experiments/ablate_beam_size.py DATA ROWS MODEL [MODEL ...]

A MODEL is a folder, or a checkpoint of the original VQ-DRAW. Runs on the first ROWS images of the test split of DATA,
with beams of 1 (greedy), 2, 4 and 8. Prints for each beam and model:

- the mean squared error in normalized pixels, and the same for pixels clamped to [0, 1], as in images;
- CPU milliseconds per image, on one thread, with the models interleaved.
"""

import sys
import time

import torch
from torch import Tensor

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tok2img.recipes.build_tokenizer import load_vqdraw
from tokenizers_vq import VQDrawForImages

BEAM_SIZES = 1, 2, 4, 8
BATCH_SIZE = 250


@torch.no_grad()
def errors_and_time(model: VQDrawForImages, pixel_values: Tensor, beam_size: int) -> tuple[float, float, float]:
    """Measure images `b c h w`: squared errors of the last state and of the decoded image, and CPU seconds of the search."""
    target, started = model.normalize(pixel_values), time.process_time()
    codes = model.encode(pixel_values, beam_size=beam_size)
    seconds = time.process_time() - started
    shown = model.normalize(model.decode(codes))
    errors = (model.vqdraw.decode(codes) - target).square().mean(), (shown - target).square().mean()
    return float(errors[0]), float(errors[1]), seconds


def measure(models: dict[str, VQDrawForImages], pixel_values: Tensor, beam_size: int) -> dict[str, Tensor]:
    """Return the two mean errors and the CPU milliseconds per image of each model, `3`.

    The models take turns on each batch.
    """
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    for batch in pixel_values.split(BATCH_SIZE):
        for name, model in models.items():
            of_state, of_image, seconds = errors_and_time(model, batch, beam_size)
            totals[name] += torch.tensor([of_state * len(batch), of_image * len(batch), 1000 * seconds])
    return {name: total / len(pixel_values) for name, total in totals.items()}


def main(data: str, num_rows: int, *paths: str) -> None:
    """Print a line for each beam size and model."""
    models = {path: load_vqdraw(path).eval() for path in paths}
    rows = load_captioned_images(data, split="test", with_captions=False, max_samples=num_rows)
    pixel_values = load_pixels(rows["image"][:], next(iter(models.values())))
    for beam_size in BEAM_SIZES:
        for name, (of_state, of_image, milliseconds) in measure(models, pixel_values, beam_size).items():
            print(
                f"beam {beam_size}  error {of_state:.4f}  clamped {of_image:.4f}  {milliseconds:6.2f} ms  {name}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
