"""Figures of an evaluation: sheets, code usage, a map of the codebook, and training curves.

Sheets need only Pillow. Charts need matplotlib; without it a warning lists those that were left out.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.images.processing import images_from_pixels

from ..atomic_io import write_atomically
from ..data.images import load_pixels
from .charts import curve_names, plot_code_usage, plot_codebook, plot_curves
from .image_sheets import make_captioned_sheet, save_image
from .text_sheets import render_text_stages, sample_random_texts
from .tokenizer_sheets import render_reconstructions, render_stages

NUM_IMAGES = 16
NUM_SAMPLES = 32
BATCH_SIZE = 128
Log = Sequence[Mapping[str, Any]]
Charts = dict[str, Callable[[Path], None]]


def save_tokenizer_figures(
    image_tokenizer: DiscreteTokenizer, images: Sequence[Any], histogram: Tensor, *, log: Log, folder: Path
) -> list[str]:
    """Save the figures of an image tokenizer: reconstructions, code usage, codebook and training curves.

    Args:
        image_tokenizer: The tokenizer.
        images: Held-out images, in any form.
        histogram: How often each code is used, `g k`.
        log: Log of its training; curves are left out if it is empty.
        folder: Folder to write to.

    Returns:
        The paths of the files.
    """
    shown = choose_evenly_spaced(images, NUM_IMAGES)
    sheets = {"reconstructions.png": render_reconstructions(image_tokenizer, shown)}
    if image_tokenizer.supports_prefix_decoding:
        pixel_values = load_pixels(choose_evenly_spaced(shown, NUM_IMAGES // 2), image_tokenizer)
        sheets["stages.png"] = render_stages(
            image_tokenizer, image_tokenizer.encode(pixel_values.to(image_tokenizer.device))
        )
    vectors = image_tokenizer.codebook_vectors()
    charts: Charts = {"code_usage.png": lambda path: plot_code_usage(histogram, path)}
    if vectors:
        patches = render_code_patches(image_tokenizer)
        charts["codebook.png"] = lambda path: plot_codebook(vectors, histogram, path, patches=patches)
    return save_sheets(sheets, folder) + save_charts(charts | curve_charts(log), folder)


def save_text_tokenizer_figures(
    model: TextSpanTokenizer, texts: Sequence[str], histogram: Tensor, *, log: Log, folder: Path
) -> list[str]:
    """Save the figures of a text tokenizer: a text file of reconstructions, code usage and training curves.

    Args:
        model: The text tokenizer.
        texts: Held-out texts.
        histogram: How often each option of each stage is used, `n k`.
        log: Log of its training; curves are left out if it is empty.
        folder: Folder to write to.

    Returns:
        The paths of the files.
    """
    stages = render_text_stages(model, choose_evenly_spaced(texts, NUM_IMAGES))
    sheet = f"{stages}\nrandom codes\n{sample_random_texts(model, NUM_IMAGES, seed=0)}"
    path = folder / "reconstructions.txt"
    write_atomically(path, sheet.encode())
    charts: Charts = {"code_usage.png": lambda path: plot_code_usage(histogram, path)}
    return [str(path), *save_charts(charts | curve_charts(log), folder)]


def save_model_figures(images: Sequence[Image.Image], captions: Sequence[str], *, log: Log, folder: Path) -> list[str]:
    """Save the figures of a model: a sheet of samples and training curves.

    Args:
        images: Generated images.
        captions: The caption of each.
        log: Log of the prior's training; curves are left out if it is empty.
        folder: Folder to write to.

    Returns:
        The paths of the files.
    """
    sheet = make_captioned_sheet(choose_evenly_spaced(images, NUM_SAMPLES), choose_evenly_spaced(captions, NUM_SAMPLES))
    return save_sheets({"samples.png": sheet}, folder) + save_charts(curve_charts(log), folder)


def curve_charts(log: Log) -> Charts:
    """Return the chart of the training curves, if the log has a loss."""
    return {"curves.png": lambda path: plot_curves(log, path)} if curve_names(log) else {}


def save_sheets(sheets: Mapping[str, Image.Image], folder: Path) -> list[str]:
    """Save sheets by their file name, and return the paths."""
    for name, sheet in sheets.items():
        save_image(sheet, folder / name)
    return [str(folder / name) for name in sheets]


def save_charts(charts: Charts, folder: Path) -> list[str]:
    """Save charts by their file name, and return the paths; without matplotlib, warn on stderr and return no path."""
    try:
        for name, plot in charts.items():
            plot(folder / name)
    except ImportError as error:
        print(f"left out {', '.join(charts)}: {error}", file=sys.stderr)
        return []
    return [str(folder / name) for name in charts]


def render_code_patches(image_tokenizer: DiscreteTokenizer) -> list[Image.Image]:
    """Render each code as an image patch: the center cell of an image that has the code in every cell.

    Returns:
        A patch for each code; none if the codes are not a single grid with a single codebook.
    """
    shape = image_tokenizer.code_shape
    if len(shape) != 2 or len(image_tokenizer.positions_per_codebook) != 1:
        return []
    codes = torch.arange(image_tokenizer.codebook_size, device=image_tokenizer.device)
    patches = []
    for batch in codes.split(BATCH_SIZE):
        pixel_values = image_tokenizer.decode(repeat(batch, "k -> k n", n=image_tokenizer.num_codes))
        # From the center, where the edges of the image have the least influence.
        height, width = pixel_values.shape[2] // shape[0], pixel_values.shape[3] // shape[1]
        top, left = shape[0] // 2 * height, shape[1] // 2 * width
        patches.append(pixel_values[:, :, top : top + height, left : left + width])
    return images_from_pixels(torch.cat(patches).cpu())


def choose_evenly_spaced(items: Sequence[Any], num: int) -> list[Any]:
    """Choose up to `num` items, evenly spaced, because neighboring rows of a data set are often similar."""
    num = min(num, len(items))
    return [items[number * len(items) // num] for number in range(num)]
