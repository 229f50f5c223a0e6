"""Captioned images of any number of files, in order and in batches, none of them kept.

`datasets` writes all rows of Parquet files and tars to its cache before the first is to be had; here they stay where they lie.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from .archive_readers import Packed, open_packed
from .archives import UNREADABLE, root_cause
from .columns import TEXT, column_of_captions, column_of_images
from .loading import check_max_rows, load_captioned_images, packed_files_of


def stream_captioned_images(
    source: str, *, split: str = "train", image_column: str = "", caption_column: str = "", max_samples: int = 0
) -> "CaptionedRows":
    """Open captioned images, of Parquet files and tars without a copy; all else as `load_captioned_images` does.

    Raises:
        ValueError: one line that names the file, column or split.
    """
    check_max_rows(max_samples or None)
    files = packed_files_of(source, split)
    if not files:
        num_rows = max_samples or None
        return DatasetRows(
            load_captioned_images(
                source, split=split, image_column=image_column, caption_column=caption_column, max_samples=num_rows
            )
        )
    opened = [rows for rows in map(open_packed, files) if len(rows)]
    if not opened:
        raise ValueError(f"{files[0]}: no rows")
    for rows in opened:  # all have the columns of the first
        image_column, caption_column = columns_of(rows, image_column, caption_column)
    return StreamedRows(opened, image_column=image_column, caption_column=caption_column, max_samples=max_samples)


def columns_of(rows: Packed, image_column: str, caption_column: str) -> tuple[str, str]:
    """The columns of images and captions in a file, those named or else found; ValueError where it has none."""
    features, source = rows.features, str(rows.path)
    image = column_of_images(features, image_column, source)
    caption = column_of_captions(features, caption_column, source)
    if features[caption] not in TEXT:
        raise ValueError(f"{source}: column {caption!r} holds {features[caption]}, not text")
    return image, caption


class DatasetRows:
    """Rows of a data set of `datasets`, with columns `image` and `caption`, as `StreamedRows` gives them."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def fingerprint(self) -> str:
        """Says whether rows are the same as those of another time, by the sizes and times of images in files of their own."""
        files = image_files(self.dataset)
        if not files:
            return str(self.dataset._fingerprint)
        digest = hashlib.sha256(self.dataset._fingerprint.encode())
        for file in files:
            digest.update(json.dumps([file, size_and_time(file)]).encode())
        return digest.hexdigest()

    @property
    def captions(self) -> Iterable[Any]:
        """All captions."""
        return self.dataset["caption"]

    def batches(self, rows: range, size: int) -> Iterator[dict[str, list[Any]]]:
        """Rows in batches."""
        return (self.dataset[first : min(first + size, rows.stop)] for first in rows[::size])


def image_files(dataset: Dataset) -> list[str]:
    """The files of images that the rows name and do not hold."""
    if not isinstance(dataset.features["image"], ImageFeature):
        return []
    contents, paths = dataset.data.column("image").flatten()
    return paths.filter(contents.is_null()).drop_null().to_pylist()


def size_and_time(file: str) -> list[int]:
    """What changes when a file is written anew; nothing of one that is not here."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]


class StreamedRows:
    """Captioned images of several files; `len` and the captions cost no image.

    Args:
        files: of one kind, one after another.
        image_column, caption_column: where they are, as `columns` finds them.
        max_samples: the first so many only; 0: all.
    """

    def __init__(self, files: Sequence[Packed], *, image_column: str, caption_column: str, max_samples: int = 0):
        self.files, self.image_column, self.caption_column = list(files), image_column, caption_column
        self.starts = np.cumsum([0, *map(len, files)]).tolist()
        self.num_rows = min(max_samples or self.starts[-1], self.starts[-1])

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def fingerprint(self) -> str:
        """Says whether rows are the same as those of another time, by the files' sizes and times."""
        stats = [(str(file.path.resolve()), file.path.stat()) for file in self.files]
        what = [
            [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
            self.image_column,
            self.caption_column,
        ]
        return hashlib.sha256(json.dumps([*what, self.num_rows]).encode()).hexdigest()

    @property
    def captions(self) -> Iterable[Any]:
        """All captions, read anew each time."""
        return Captions(self)

    def batches(self, rows: range, size: int) -> Iterator[dict[str, list[Any]]]:
        """Rows in batches, with columns `image` and `caption`."""
        cells = self.cells(rows, [self.image_column, self.caption_column])
        while batch := list(islice(cells, size)):
            images, captions = zip(*batch, strict=True)
            yield {"image": list(images), "caption": list(captions)}

    def cells(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The cells of some columns; ValueError that names the file for one that is damaged."""
        for file, first in zip(self.files, self.starts, strict=False):
            own = range(max(rows.start - first, 0), min(rows.stop - first, len(file)))
            try:
                yield from file.read(own, columns) if own else ()
            except UNREADABLE as error:
                raise ValueError(f"{file.path}: cannot be read: {root_cause(error)}") from error


CaptionedRows = DatasetRows | StreamedRows


@dataclass(frozen=True)
class Captions:
    """The captions of rows, each time anew."""

    rows: StreamedRows

    def __iter__(self) -> Iterator[Any]:
        rows = self.rows
        return (caption for (caption,) in rows.cells(range(len(rows)), [rows.caption_column]))
