"""Draw the figures of `docs/concepts.md`: four small tokenizers, trained on the built-in shapes, and what their codes look like.

    OMP_NUM_THREADS=1 python docs/figures/make_figures.py

One CPU thread, a few minutes, seeded. Writes the PNG files next to this script.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tok2img import shapes_dataset
from tok2img.data.images import load_pixels
from tok2img.recipes.config import TokenizerRecipe
from tok2img.recipes.train_tokenizer import train_tokenizer
from tok2img.visualization.image_sheets import make_captioned_sheet, make_image_grid, make_stage_sheet, save_image
from tok2img.visualization.report_figures import render_code_patches
from tokenizers_vq.images.processing import images_from_pixels

FOLDER = Path(__file__).parent
TILE = 192  # pixels of an enlarged image
NUM_IMAGES = 3
FIRST_IMAGE = 4  # of the validation split: two scenes with two objects among the three
COMMON: dict[str, Any] = {
    "data": "shapes",
    "max_train_samples": 4000,
    "eval_steps": 0,
    "sample_steps": 0,
    "logging_steps": 100,
    "batch_size": 16,
    "learning_rate": 3e-3,
}
VQVAE = {"hidden_channels": 64, "decay": 0.95}
RECIPES = {
    "vqvae": TokenizerRecipe(max_steps=500, optimizer="muon", model=VQVAE | {"codebook_size": 128}, **COMMON),
    "two_grids": TokenizerRecipe(
        max_steps=300, optimizer="muon", model=VQVAE | {"codebook_size": 128, "num_grids": 2}, **COMMON
    ),
    "residual": TokenizerRecipe(
        max_steps=400,
        optimizer="muon",
        model=VQVAE | {"quantizer": "residual", "num_quantizers": 4, "codebook_size": 64, "num_downsamples": 3},
        **COMMON,
    ),
    "vqdraw": TokenizerRecipe(
        tokenizer="vqdraw",
        max_steps=120,
        model={
            "num_stages": 16,
            "codebook_size": 16,
            "hidden_channels": 32,
            "feature_channels": 32,
            "num_residual_blocks": 1,
            "segment_length": 1,
        },
        **COMMON,
    ),
}


def enlarge(image: Image.Image, size: int = TILE) -> Image.Image:
    """Repeat pixels until an image is `size` pixels wide."""
    return image.resize((size, size), Image.Resampling.NEAREST)


def code_grid(codes: Tensor, patches: list[Image.Image]) -> Image.Image:
    """Draw codes `h w` as a grid of numbers, each on the mean color of what its code looks like."""
    rows, columns = codes.shape
    tile, cell = Image.new("RGB", (TILE, TILE), "white"), TILE // columns
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(10)
    for row in range(rows):
        for column in range(columns):
            code = int(codes[row, column])
            color = patches[code].resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            left, top = column * cell, row * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=color)
            is_dark = sum(color) < 330  # type: ignore[arg-type]
            text = {"fill": "white" if is_dark else "black", "font": font, "anchor": "mm"}
            draw.text((left + cell / 2, top + cell / 2), str(code), **text)
    return tile


def outline(image: Image.Image, color: str) -> Image.Image:
    """Put a border of four pixels around an image."""
    framed = Image.new("RGB", (image.width + 8, image.height + 8), color)
    framed.paste(image, (4, 4))
    return framed


def images_by_stage(tokenizer: Any, pixels: Tensor, shown: list[int]) -> list[list[Image.Image]]:
    """Return, for each image of `b c h w`, its versions after the stages `shown` (counted from 1) and the original."""
    stages = list(tokenizer.decode_progressively(tokenizer.encode(pixels)))
    tiles = [images_from_pixels(stages[number - 1]) for number in shown] + [images_from_pixels(pixels)]
    return [[enlarge(image, TILE // 2) for image in row] for row in zip(*tiles, strict=True)]


def draw_vqvae(tokenizer: Any, pixels: Tensor) -> None:
    """Save `vqvae.png`, images, their codes and reconstructions, and `codebook.png`, all codes as patches."""
    codes, patches = tokenizer.encode(pixels), render_code_patches(tokenizer)
    originals, decoded = images_from_pixels(pixels), images_from_pixels(tokenizer.decode(codes))
    rows = [
        [enlarge(original), code_grid(row.view(tokenizer.code_shape), patches), enlarge(reconstruction)]
        for original, row, reconstruction in zip(originals, codes, decoded, strict=True)
    ]
    save_image(make_image_grid([tile for row in rows[:2] for tile in row], 3), FOLDER / "vqvae.png")
    save_image(make_image_grid([enlarge(patch, 24) for patch in patches], 32), FOLDER / "codebook.png")


def draw_stages(tokenizer: Any, pixels: Tensor, name: str, shown: list[int]) -> None:
    """Save images after the stages `shown`, with the number of codes above, and the originals at the right."""
    ends = [sum(tokenizer.positions_per_codebook[:number]) for number in shown]
    rows = images_by_stage(tokenizer, pixels, shown)
    sheet = make_stage_sheet([row[:-1] for row in rows], num_codes=ends)
    originals = make_image_grid([row[-1] for row in rows], 1)
    joined = Image.new("RGB", (sheet.width + originals.width + 16, sheet.height), "white")
    joined.paste(sheet, (0, 0))
    joined.paste(originals, (sheet.width + 16, sheet.height - originals.height))
    save_image(joined, FOLDER / name)


def draw_two_grids(tokenizer: Any, pixels: Tensor) -> None:
    """Save `two_grids.png`: two images, their reconstructions, and images of one's coarse and the other's fine codes."""
    num_coarse, codes = tokenizer.positions_per_codebook[0], tokenizer.encode(pixels[:2])
    coarse, fine = codes[:, :num_coarse], codes[:, num_coarse:]
    mixed = torch.cat([codes, torch.cat([coarse, fine.flip(0)], dim=1)])
    images = [*images_from_pixels(pixels[:2]), *images_from_pixels(tokenizer.decode(mixed))]
    captions = [
        "image A",
        "image B",
        "coarse A + fine A",
        "coarse B + fine B",
        "coarse A + fine B",
        "coarse B + fine A",
    ]
    save_image(
        make_captioned_sheet([enlarge(image, TILE // 2) for image in images], captions), FOLDER / "two_grids.png"
    )


def draw_options(tokenizer: Any, pixels: Tensor) -> None:
    """Save `vqdraw_options.png`: all options of three stages for one image, the chosen one with a red border."""
    codes, num_options = tokenizer.encode(pixels[:1]), tokenizer.codebook_size
    tiles = []
    for stage in (0, 1, 3):
        prefix = codes[:, :stage].expand(num_options, stage)
        options = torch.cat([prefix, torch.arange(num_options)[:, None]], dim=1)
        for number, image in enumerate(images_from_pixels(tokenizer.decode(options))):
            chosen = number == int(codes[0, stage])
            tiles.append(outline(enlarge(image, 48), "#d1495b" if chosen else "white"))
    save_image(make_image_grid(tiles, num_options), FOLDER / "vqdraw_options.png")


def main() -> None:
    """Train each tokenizer and draw its figures."""
    torch.set_num_threads(1)
    rows = shapes_dataset("validation", FIRST_IMAGE + NUM_IMAGES)["image"][FIRST_IMAGE:]
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            recipe.out = str(Path(folder, name))
            tokenizer: Any = train_tokenizer(recipe)
            tokenizer.eval()
            pixels = load_pixels(rows, tokenizer)
            if name == "vqvae":
                draw_vqvae(tokenizer, pixels)
            elif name == "vqdraw":
                draw_stages(tokenizer, pixels, "vqdraw.png", [1, 2, 3, 4, 6, 8, 12, 16])
                draw_options(tokenizer, pixels)
            elif name == "two_grids":
                draw_two_grids(tokenizer, pixels)
            else:
                draw_stages(tokenizer, pixels, "residual.png", [1, 2, 3, 4])
            error = (tokenizer.decode(tokenizer.encode(pixels)) - pixels).square().mean()
            print(f"{name}: squared error {error:.5f}, {time.process_time() - started:.0f} CPU seconds so far")


if __name__ == "__main__":
    main()
