"""Sheets of images, made with Pillow alone.

A sheet is a table of tiles: images, captions and headers.
"""

import io
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

from ..atomic_io import write_atomically

T = TypeVar("T")
MIN_TILE_SIZE = 96
FONT_SIZE = 14
MAX_CAPTION_LINES = 5


def make_image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Make a grid of images at their own size, with `columns` images in a row."""
    return _make_table(_split_rows(images, columns), gap=2)


def make_captioned_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8) -> Image.Image:
    """Make a sheet of images with their captions below.

    Small images are enlarged by a whole factor, without interpolation, to about 96 pixels.

    Args:
        images: Images.
        captions: The caption of each image; it is wrapped, and ends in dots after five lines.
        columns: Number of images in a row.
    """
    _check_same_length(images, captions, "images", "captions")
    tiles = _enlarge(images)
    labels = [_wrap(caption, width=tile.width) for tile, caption in zip(tiles, captions, strict=True)]
    rows: list[list[Image.Image]] = []
    for row_tiles, row_labels in zip(_split_rows(tiles, columns), _split_rows(labels, columns), strict=True):
        num_lines = max(len(lines) for lines in row_labels)
        rows += [row_tiles, [_render_label(lines, num_lines=num_lines) for lines in row_labels]]
    return _make_table(rows, gap=8)


def make_reconstruction_sheet(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image], *, columns: int = 8
) -> Image.Image:
    """Make a sheet with each reconstruction below its original.

    Args:
        originals: Original images.
        reconstructions: The reconstruction of each.
        columns: Number of pairs side by side.
    """
    _check_same_length(originals, reconstructions, "originals", "reconstructions")
    upper, lower = _render_label(["original"]), _render_label(["reconstruction"])
    pairs = zip(_split_rows(_enlarge(originals), columns), _split_rows(_enlarge(reconstructions), columns), strict=True)
    return _make_table([row for above, below in pairs for row in ([upper, *above], [lower, *below])], gap=4)


def make_stage_sheet(stages: Sequence[Sequence[Image.Image]], *, num_codes: Sequence[int] | None = None) -> Image.Image:
    """Make a sheet of progressive decoding: one row per image, from coarse to fine.

    Args:
        stages: For each image, the image after each stage.
        num_codes: Number of codes that each column is decoded from; None: 1, 2, 3 and so on.
    """
    _check_not_empty(stages)
    counts = list(num_codes or range(1, len(stages[0]) + 1))
    if any(len(row) != len(counts) for row in stages):
        raise ValueError(
            f"Expected {len(counts)} stages in every row, one for each of the headers, got {[len(row) for row in stages]}."
        )
    header = [_render_label([f"{count} code" if count == 1 else f"{count} codes"]) for count in counts]
    return _make_table([header, *(_enlarge(row) for row in stages)], gap=4)


def save_image(image: Image.Image, path: str | PathLike[str]) -> None:
    """Save an image atomically, in the format of the file's suffix; missing folders are created."""
    content = io.BytesIO()
    image.save(content, format=infer_image_format(path))
    write_atomically(path, content.getvalue())


def infer_image_format(path: str | PathLike[str]) -> str:
    """Return the image format of a file's suffix. Commands call it before any work, to fail early.

    Raises:
        ValueError: If the suffix is not that of an image format that Pillow can write.
    """
    suffix = Path(path).suffix.lower()
    image_format = Image.registered_extensions().get(suffix)
    if image_format is None or image_format not in Image.SAVE:
        raise ValueError(f"cannot write {path}: the suffix {suffix!r} is not an image format; use .png, .webp or .jpg")
    return image_format


def _make_table(rows: Sequence[Sequence[Image.Image]], *, gap: int) -> Image.Image:
    """Arrange tiles in a table, each centered in its cell.

    Args:
        rows: Rows of tiles. Rows may differ in length.
        gap: Space between tiles and around the table, in pixels.
    """
    num_columns = max(len(row) for row in rows)
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(num_columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for tile, width in zip(row, widths, strict=False):
            sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
            left += width + gap
        top += height + gap
    return sheet


def _split_rows(items: Sequence[T], columns: int) -> list[list[T]]:
    """Split items into rows of `columns` items; the last row may be shorter."""
    _check_not_empty(items)
    if columns < 1:
        raise ValueError(f"Expected at least 1 column, got {columns}.")
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]


def _enlarge(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Enlarge small images, all by the same whole factor, so that the largest reaches `MIN_TILE_SIZE` pixels."""
    factor = -(-MIN_TILE_SIZE // max(max(image.size) for image in images))
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]


def _wrap(text: str, *, width: int) -> list[str]:
    """Wrap text into lines of at most `width` pixels; a word is broken only if it is longer than a line."""
    font = ImageFont.load_default(FONT_SIZE)
    lines: list[str] = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines += _break_word(word, font, width=width)
    lines = [line for line in lines if line]
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], "..."]
    return lines


def _break_word(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, width: int) -> list[str]:
    """Break a word into pieces of at most `width` pixels."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _render_label(lines: list[str], num_lines: int = 1) -> Image.Image:
    """Render lines of text as a tile with the height of `num_lines` lines."""
    font = ImageFont.load_default(FONT_SIZE)
    line_height = FONT_SIZE + 3
    width = max((math.ceil(font.getlength(line)) for line in lines), default=1)
    tile = Image.new("RGB", (width, line_height * num_lines), "white")
    draw = ImageDraw.Draw(tile)
    for index, line in enumerate(lines):
        draw.text((width / 2, index * line_height), line, fill="black", font=font, anchor="ma")
    return tile


def _check_not_empty(items: Sequence[Any]) -> None:
    if not items:
        raise ValueError("Expected at least one image, got no image.")


def _check_same_length(first: Sequence[Any], second: Sequence[Any], first_name: str, second_name: str) -> None:
    _check_not_empty(first)
    if len(first) != len(second):
        raise ValueError(
            f"Expected as many {first_name} as {second_name}, got {len(first)} {first_name} but {len(second)} {second_name}."
        )
