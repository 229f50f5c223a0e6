"""Ablate the initialization of VQ-DRAW: as in the original or from k-means, without and with replaced dead options.

    python training/experiments/ablate_vqdraw_init.py DATA STEPS

The architecture is the published MNIST model, with learned biases at stage 0 only. Training is in
bfloat16 if the processor
has instructions for it. Prints for each initialization, halfway and at the end, on 1,000 test
digits: the squared error in
normalized pixels, and the options in use at stage 0 and at all stages.
"""

import sys

import torch
from torch import Tensor

from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tokenizers_vq import VQDrawForImages, VQDrawImageConfig

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
INITIALIZATIONS = {
    "as the original": (False, False),
    "replacement": (False, True),
    "k-means": (True, False),
    "k-means and replacement": (True, True),
}


def train(
    pixels: Tensor, test: Tensor, *, from_data: bool, replace_dead_options: bool, num_steps: int
) -> VQDrawForImages:
    """Train one model, and print its figures halfway and at the end."""
    torch.manual_seed(0)
    model = VQDrawForImages(
        VQDrawImageConfig.preset("mnist", replace_dead_options=replace_dead_options, num_aux_options=4)
    ).train()
    if from_data:
        model.init_from_data(pixels[:4000])
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = model(pixels[torch.randint(len(pixels), (BATCH_SIZE,))]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (num_steps // 2, num_steps):
            print(f"  {step:5} steps  {figures(model, test)}", flush=True)
    return model


@torch.no_grad()
def figures(model: VQDrawForImages, test: Tensor) -> str:
    """Format the squared error in normalized pixels and the options in use."""
    model.eval()
    target = model.normalize(test)
    codes = model.encode(test)
    error = (model.vqdraw.decode(codes) - target).square().mean()
    used = [len(column.unique()) for column in codes.T]
    model.train()
    return f"error {error:.4f}  options in use: {used[0]} of 64 at stage 0, {sum(used) / len(used):.1f} of 64 per stage"


def main(data: str, num_steps: int) -> None:
    """Train with every initialization on the same images."""
    reader = VQDrawForImages(VQDrawImageConfig.preset("mnist"))
    rows = load_captioned_images(data, split="train", with_captions=False, max_samples=20_000)
    test = load_captioned_images(data, split="test", with_captions=False, max_samples=1000)
    pixels, held_out = (load_pixels(each["image"][:], reader) for each in (rows, test))
    for name, (from_data, replace_dead_options) in INITIALIZATIONS.items():
        print(name)
        train(pixels, held_out, from_data=from_data, replace_dead_options=replace_dead_options, num_steps=num_steps)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
