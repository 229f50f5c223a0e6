"""How near the codes of VQ-DRAW models come to test images, by beams of several widths, and what it costs to find them.

    python training/experiments/ablate_beam_size.py DATA ROWS MODEL [MODEL ...]

A MODEL is a folder, or a checkpoint of the original VQ-DRAW. Prints, for the first ROWS of the test split of DATA and a beam of 1 (greedy),
2, 4 and 8: the mean squared error in normalised pixels; the same where pixels outside of [0, 1] are cut off, as in images; and CPU
milliseconds an image of one thread, models by turns.
"""

import sys
import time

import torch
from torch import Tensor

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tok2img.recipes.init_from import load_vqdraw
from tokenizers_vq import VQDrawForImages

BEAM_SIZES = 1, 2, 4, 8
BATCH_SIZE = 250


@torch.no_grad()
def errors_and_time(model: VQDrawForImages, pixel_values: Tensor, beam_size: int) -> tuple[float, float, float]:
    """Squared errors of the last state, and of the image that it decodes to, of `b c h w`; and CPU seconds of the search."""
    target, started = model.normalize(pixel_values), time.process_time()
    codes = model.encode(pixel_values, beam_size=beam_size)
    seconds = time.process_time() - started
    shown = model.normalize(model.decode(codes))
    errors = (model.draw.decode(codes) - target).square().mean(), (shown - target).square().mean()
    return float(errors[0]), float(errors[1]), seconds


def measure(models: dict[str, VQDrawForImages], pixel_values: Tensor, beam_size: int) -> dict[str, Tensor]:
    """Mean errors and CPU milliseconds an image, `3`, of each model: one batch after another, and for each all models in turn."""
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    for batch in pixel_values.split(BATCH_SIZE):
        for name, model in models.items():
            of_state, of_image, seconds = errors_and_time(model, batch, beam_size)
            totals[name] += torch.tensor([of_state * len(batch), of_image * len(batch), 1000 * seconds])
    return {name: total / len(pixel_values) for name, total in totals.items()}


def main(data: str, num_rows: int, *paths: str) -> None:
    """All models, beam by beam."""
    models = {path: load_vqdraw(path).eval() for path in paths}
    rows = load_captioned_images(data, split="test", with_captions=False, max_samples=num_rows)
    pixel_values = load_pixels(rows["image"][:], next(iter(models.values())))
    for beam_size in BEAM_SIZES:
        for name, (of_state, of_image, milliseconds) in measure(models, pixel_values, beam_size).items():
            print(
                f"beam {beam_size}  error {of_state:.4f}  cut off {of_image:.4f}  {milliseconds:6.2f} ms  {name}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
