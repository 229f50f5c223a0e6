"""Sheets of images, drawn with Pillow alone.

A sheet is a table of tiles; captions and headers are tiles too.
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


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images as they are, `columns` in a row."""
    return _table(_chunks(images, columns), gap=2)


def captioned_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8) -> Image.Image:
    """Images with their captions wrapped underneath.

    Small images are enlarged by a whole factor, pixel by pixel, to about 96 pixels; a caption of more than five
    lines ends in dots.
    """
    _check_equally_many(images, captions, "images", "captions")
    tiles = _enlarged(images)
    labels = [_wrap(caption, width=tile.width) for tile, caption in zip(tiles, captions, strict=True)]
    rows: list[list[Image.Image]] = []
    for row_tiles, row_labels in zip(_chunks(tiles, columns), _chunks(labels, columns), strict=True):
        num_lines = max(len(lines) for lines in row_labels)
        rows += [row_tiles, [_label(lines, num_lines=num_lines) for lines in row_labels]]
    return _table(rows, gap=8)


def reconstruction_sheet(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image], *, columns: int = 8
) -> Image.Image:
    """Each reconstruction under its original, `columns` pairs side by side."""
    _check_equally_many(originals, reconstructions, "originals", "reconstructions")
    upper, lower = _label(["original"]), _label(["reconstruction"])
    pairs = zip(_chunks(_enlarged(originals), columns), _chunks(_enlarged(reconstructions), columns), strict=True)
    return _table([row for above, below in pairs for row in ([upper, *above], [lower, *below])], gap=4)


def stage_sheet(stages: Sequence[Sequence[Image.Image]], *, num_codes: Sequence[int] | None = None) -> Image.Image:
    """Images that sharpen from left to right.

    Args:
        stages: a row for each image, and in it the image after each stage
        num_codes: how many codes each column was drawn from; counts from 1 if absent
    """
    _check_not_empty(stages)
    counts = list(num_codes or range(1, len(stages[0]) + 1))
    if any(len(row) != len(counts) for row in stages):
        raise ValueError(f"got rows of {[len(row) for row in stages]} stages under {len(counts)} headers")
    header = [_label([f"{count} code" if count == 1 else f"{count} codes"]) for count in counts]
    return _table([header, *(_enlarged(row) for row in stages)], gap=4)


def save_image(image: Image.Image, path: str | PathLike[str]) -> None:
    """Write an image whole or not at all, in the format its suffix names; missing folders are made."""
    content = io.BytesIO()
    image.save(content, format=check_suffix(path))
    write_atomically(path, content.getvalue())


def check_suffix(path: str | PathLike[str]) -> str:
    """The image format that a file's suffix names; ValueError where it names none, for asking before any work."""
    suffix = Path(path).suffix.lower()
    image_format = Image.registered_extensions().get(suffix)
    if image_format is None or image_format not in Image.SAVE:
        raise ValueError(f"cannot write {path}: its suffix {suffix!r} names no image format; use .png, .webp or .jpg")
    return image_format


def _table(rows: Sequence[Sequence[Image.Image]], *, gap: int) -> Image.Image:
    """Tiles in rows and columns as wide as their largest tile, each tile in the middle of its place."""
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


def _chunks(items: Sequence[T], columns: int) -> list[list[T]]:
    _check_not_empty(items)
    if columns < 1:
        raise ValueError(f"got {columns} columns, expected at least 1")
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]


def _enlarged(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Repeat the pixels of small images, all by one factor, so that the largest reaches the size of a tile."""
    factor = -(-MIN_TILE_SIZE // max(max(image.size) for image in images))
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]


def _wrap(text: str, *, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels, and words only where one is longer than a line."""
    font = ImageFont.load_default(FONT_SIZE)
    lines: list[str] = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines += _pieces(word, font, width=width)
    lines = [line for line in lines if line]
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], "..."]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, width: int) -> list[str]:
    """Cut a word where it grows longer than `width` pixels."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _label(lines: list[str], num_lines: int = 1) -> Image.Image:
    """Lines of text as a tile, as high as `num_lines` lines."""
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
        raise ValueError("got no image to draw")


def _check_equally_many(first: Sequence[Any], second: Sequence[Any], first_name: str, second_name: str) -> None:
    _check_not_empty(first)
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} {first_name} but {len(second)} {second_name}")
