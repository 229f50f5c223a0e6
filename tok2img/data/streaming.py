"""Streams captioned images from any number of files, in order and in batches, without keeping or copying them.

`datasets` copies Parquet files into its cache before the first row can be read. Tokenizing reads
every row once, so here
they are read in place.
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

from .archive_readers import MEMBER_PATH, ArchiveReader, open_archive
from .archives import UNREADABLE, root_cause
from .columns import TEXT, column_of_captions, column_of_images
from .loading import archive_files_of, check_max_samples, load_captioned_images


def stream_captioned_images(
    source: str, *, split: str = "train", image_column: str = "", caption_column: str = "", max_samples: int = 0
) -> "CaptionedRows":
    """Open captioned images for reading in order: Parquet files and tars in place, others by `load_captioned_images`.

    Args:
        source: As in `load_captioned_images`.
        split: Name of the split.
        image_column: Column of images; "" finds it.
        caption_column: Column of captions; "" finds it.
        max_samples: Number of rows to keep, from the start; 0 keeps all.

    Raises:
        ValueError: In one line that names the file, column or split.
    """
    check_max_samples(max_samples or None)
    files = archive_files_of(source, split)
    if not files:
        num_rows = max_samples or None
        return DatasetRows(
            load_captioned_images(
                source, split=split, image_column=image_column, caption_column=caption_column, max_samples=num_rows
            )
        )
    opened = [rows for rows in map(open_archive, files) if len(rows)]
    if not opened:
        raise ValueError(f"{files[0]}: no rows")
    for rows in opened:  # all have the columns of the first
        image_column, caption_column = columns_of(rows, image_column, caption_column)
    return StreamedRows(opened, image_column=image_column, caption_column=caption_column, max_samples=max_samples)


def columns_of(rows: ArchiveReader, image_column: str, caption_column: str) -> tuple[str, str]:
    """Find the columns of images and captions in a file; "" finds one by its name or type.

    Raises:
        ValueError: If a column is missing or holds something else.
    """
    features, source = rows.features, str(rows.path)
    image = column_of_images(features, image_column, source)
    caption = column_of_captions(features, caption_column, source)
    if features[caption] not in TEXT:
        raise ValueError(f"{source}: column {caption!r} holds {features[caption]}, not text")
    return image, caption


class DatasetRows:
    """A `datasets.Dataset` with columns `image` and `caption`, with the interface of `StreamedRows`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes with the rows, and with size or time of image files that they name."""
        files = image_files(self.dataset)
        if not files:
            return str(self.dataset._fingerprint)
        digest = hashlib.sha256(self.dataset._fingerprint.encode())
        for file in files:
            digest.update(json.dumps([file, size_and_time(file)]).encode())
        return digest.hexdigest()

    @property
    def captions(self) -> Iterable[Any]:
        """All captions, in order."""
        return self.dataset["caption"]

    def batches(self, rows: range, size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield `rows` in batches of `size`: columns `image` and `caption`."""
        return (self.dataset[first : min(first + size, rows.stop)] for first in rows[::size])


def image_files(dataset: Dataset) -> list[str]:
    """Return the files, or tars, of images that the rows name but do not contain."""
    if not isinstance(dataset.features["image"], ImageFeature):
        return []
    contents, paths = dataset.data.column("image").flatten()
    named = paths.filter(contents.is_null()).drop_null().to_pylist()
    return [match[1] if (match := MEMBER_PATH.fullmatch(path)) else path for path in named]


def size_and_time(file: str) -> list[int]:
    """Return size and modification time of a file; an empty list if there is none."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]


class StreamedRows:
    """Captioned images of several files. Its length and captions are read without reading an image.

    Args:
        files: Readers of one kind, whose rows follow one another.
        image_column: Column of images.
        caption_column: Column of captions.
        max_samples: Number of rows to keep, from the start; 0 keeps all.
    """

    def __init__(self, files: Sequence[ArchiveReader], *, image_column: str, caption_column: str, max_samples: int = 0):
        self.files, self.image_column, self.caption_column = list(files), image_column, caption_column
        self.starts = np.cumsum([0, *map(len, files)]).tolist()
        self.num_rows = min(max_samples or self.starts[-1], self.starts[-1])

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes with the files' sizes and times, the columns and the number of rows."""
        stats = [(str(file.path.resolve()), file.path.stat()) for file in self.files]
        what = [
            [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
            self.image_column,
            self.caption_column,
        ]
        return hashlib.sha256(json.dumps([*what, self.num_rows]).encode()).hexdigest()

    @property
    def captions(self) -> Iterable[Any]:
        """All captions, read from the files each time they are iterated."""
        return Captions(self)

    def batches(self, rows: range, size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield `rows` in batches of `size`: columns `image` and `caption`."""
        cells = self.cells(rows, [self.image_column, self.caption_column])
        while batch := list(islice(cells, size)):
            images, captions = zip(*batch, strict=True)
            yield {"image": list(images), "caption": list(captions)}

    def cells(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the cells of some columns, row by row; ValueError that names a damaged file."""
        for file, first in zip(self.files, self.starts, strict=False):
            own = range(max(rows.start - first, 0), min(rows.stop - first, len(file)))
            try:
                yield from file.read(own, columns) if own else ()
            except UNREADABLE as error:
                raise ValueError(f"{file.path}: cannot be read: {root_cause(error)}") from error


CaptionedRows = DatasetRows | StreamedRows


@dataclass(frozen=True)
class Captions:
    """Iterates over captions without holding them in memory."""

    rows: StreamedRows

    def __iter__(self) -> Iterator[Any]:
        rows = self.rows
        return (caption for (caption,) in rows.cells(range(len(rows)), [rows.caption_column]))
