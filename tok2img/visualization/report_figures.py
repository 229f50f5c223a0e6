"""The images that `evaluate` lays beside its numbers: sheets, code usage, a map of the codebook, and the curves of training.

Sheets need Pillow alone. Charts need matplotlib; without it one line says which were left out, and the numbers stand.
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
from .image_sheets import captioned_sheet, save_image
from .text_sheets import random_texts, text_sheet
from .tokenizer_sheets import reconstructions_sheet, stages_sheet

NUM_IMAGES = 16
NUM_SAMPLES = 32
BATCH_SIZE = 128
Log = Sequence[Mapping[str, Any]]
Charts = dict[str, Callable[[Path], None]]


def save_tokenizer_figures(
    image_tokenizer: DiscreteTokenizer, images: Sequence[Any], histogram: Tensor, *, log: Log, folder: Path
) -> list[str]:
    """Draw what an image tokenizer does with some images, how its codes are used, and how it was trained.

    Args:
        histogram: how often each code is used, `g k`
        log: of its training; curves are drawn where there is one
        folder: where the images go

    Returns:
        The files that were written.
    """
    shown = evenly_spaced(images, NUM_IMAGES)
    sheets = {"reconstructions.png": reconstructions_sheet(image_tokenizer, shown)}
    if image_tokenizer.supports_prefix_decoding:
        pixel_values = load_pixels(evenly_spaced(shown, NUM_IMAGES // 2), image_tokenizer)
        sheets["stages.png"] = stages_sheet(
            image_tokenizer, image_tokenizer.encode(pixel_values.to(image_tokenizer.device))
        )
    vectors = image_tokenizer.codebook_vectors()
    charts: Charts = {"code_usage.png": lambda path: plot_code_usage(histogram, path)}
    if vectors:
        patches = code_patches(image_tokenizer)
        charts["codebook.png"] = lambda path: plot_codebook(vectors, histogram, path, patches=patches)
    return save_sheets(sheets, folder) + save_charts(charts | curves_of(log), folder)


def save_text_tokenizer_figures(
    model: TextSpanTokenizer, texts: Sequence[str], histogram: Tensor, *, log: Log, folder: Path
) -> list[str]:
    """As `save_tokenizer_figures` for texts: what some of them say stage by stage, and what random codes say, is a text file."""
    sheet = f"{text_sheet(model, evenly_spaced(texts, NUM_IMAGES))}\nrandom codes\n{random_texts(model, NUM_IMAGES, seed=0)}"
    path = folder / "reconstructions.txt"
    write_atomically(path, sheet.encode())
    charts: Charts = {"code_usage.png": lambda path: plot_code_usage(histogram, path)}
    return [str(path), *save_charts(charts | curves_of(log), folder)]


def save_model_figures(images: Sequence[Image.Image], captions: Sequence[str], *, log: Log, folder: Path) -> list[str]:
    """A sheet of some of a model's images with their captions, and how it was trained; returns the files."""
    sheet = captioned_sheet(evenly_spaced(images, NUM_SAMPLES), evenly_spaced(captions, NUM_SAMPLES))
    return save_sheets({"samples.png": sheet}, folder) + save_charts(curves_of(log), folder)


def curves_of(log: Log) -> Charts:
    """The curves of a run that kept its log, where it came to log a loss."""
    return {"curves.png": lambda path: plot_curves(log, path)} if curve_names(log) else {}


def save_sheets(sheets: Mapping[str, Image.Image], folder: Path) -> list[str]:
    """Write sheets under their names; returns the files."""
    for name, sheet in sheets.items():
        save_image(sheet, folder / name)
    return [str(folder / name) for name in sheets]


def save_charts(charts: Charts, folder: Path) -> list[str]:
    """Draw charts to files of their names and return these; none, and one line on stderr, without matplotlib."""
    try:
        for name, draw in charts.items():
            draw(folder / name)
    except ImportError as error:
        print(f"left out {', '.join(charts)}: {error}", file=sys.stderr)
        return []
    return [str(folder / name) for name in charts]


def code_patches(image_tokenizer: DiscreteTokenizer) -> list[Image.Image]:
    """Each code as the middle cell of an image that has it in every cell; none where codes are not one grid of one codebook."""
    shape = image_tokenizer.code_shape
    if len(shape) != 2 or len(image_tokenizer.positions_per_codebook) != 1:
        return []
    codes = torch.arange(image_tokenizer.codebook_size, device=image_tokenizer.device)
    patches = [
        center_cell(image_tokenizer.decode(repeat(some, "k -> k n", n=image_tokenizer.num_codes)), *shape)
        for some in codes.split(BATCH_SIZE)
    ]
    return images_from_pixels(torch.cat(patches).cpu())


def center_cell(pixel_values: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The cell in the middle of images `b c h w` of so many rows and columns of cells."""
    height, width = pixel_values.shape[2] // num_rows, pixel_values.shape[3] // num_columns
    top, left = num_rows // 2 * height, num_columns // 2 * width
    return pixel_values[:, :, top : top + height, left : left + width]


def evenly_spaced(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` of the items, spread evenly over all of them: neighbours in a data set are often alike."""
    num = min(num, len(items))
    return [items[number * len(items) // num] for number in range(num)]
