"""Rows of one Parquet file or webdataset tar, read from where they lie.

In memory is what is read: a run of pages of a Parquet file, or a row of a tar and the list of what lies where in it.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow.parquet as pq
from datasets import Features, Value
from datasets import Image as ImageFeature

from .archives import UNREADABLE, root_cause
from .columns import CAPTION_NAMES
from .loading import IMAGE_SUFFIXES

BUFFER_BYTES = 2**20
ROWS_AT_ONCE = 64
IMAGE_FIELDS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXT_FIELDS = ("txt", *CAPTION_NAMES)
# As webdataset has it: what comes before the first dot of a name says which row a file belongs to, what comes after is its column.
KEY_AND_FIELD = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


class Place(NamedTuple):
    """Where in a tar a file lies, in bytes."""

    offset: int
    size: int


class Packed(Protocol):
    """A file of rows."""

    path: Path

    def __len__(self) -> int: ...

    @property
    def features(self) -> Features:
        """What its columns hold."""
        ...

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The cells of some columns, row by row."""
        ...


def open_packed(file: Path) -> Packed:
    """The rows of a file; ValueError that names it where it is damaged."""
    try:
        return ParquetRows(file) if file.suffix == ".parquet" else TarRows(file)
    except UNREADABLE as error:
        raise ValueError(f"{file}: cannot be read as {file.suffix[1:]}: {root_cause(error)}") from error


class ParquetRows:
    """Rows of a Parquet file."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = pq.read_metadata(path)

    def __len__(self) -> int:
        return self.metadata.num_rows

    @property
    def features(self) -> Features:
        """As `datasets` reads them from the schema."""
        return Features.from_arrow_schema(self.metadata.schema.to_arrow_schema())

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The cells of some columns, row by row, out of the row groups that hold them."""
        sizes = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = [int(group) for group in np.flatnonzero((starts[:-1] < rows.stop) & (starts[1:] > rows.start))]
        skipped = rows.start - int(starts[groups[0]])
        with pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            runs = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(columns), use_threads=False)
            cells = (row for run in runs for row in zip(*(run[name].to_pylist() for name in columns), strict=True))
            yield from islice(cells, skipped, skipped + len(rows))


class TarRows:
    """Rows of a webdataset tar: files whose names are alike up to the first dot. What JSON holds stands in columns of its own."""

    def __init__(self, path: Path):
        self.path, self.changed = path, path.stat().st_mtime_ns
        self.num_rows = len(self.places())

    def __len__(self) -> int:
        return self.num_rows

    def places(self) -> list[dict[str, Place]]:
        """Where the files of each row lie."""
        return index_tar(self.path, self.changed)

    @property
    def features(self) -> Features:
        """What the files of the first row hold."""
        places = self.places()[0]
        with self.path.open("rb") as file:
            record = read_json_member(file, places["json"]) if "json" in places else {}
        texts = [name for name, value in record.items() if isinstance(value, str)]
        texts += [name for name in places if name in TEXT_FIELDS]
        images = {name: ImageFeature(decode=False) for name in places if name in IMAGE_FIELDS}
        return Features({name: Value("string") for name in texts} | images)

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The cells of some columns, row by row; None for what a row does not have."""
        with self.path.open("rb") as file:
            for places in self.places()[rows.start : rows.stop]:
                yield tuple(cell(file, places, name) for name in columns)


@lru_cache(maxsize=1)
def index_tar(tar: Path, changed: int) -> list[dict[str, Place]]:
    """Where the files of each row of a tar lie, by what their names end in; `changed` tells it from what was there before."""
    del changed
    rows, key_before = [], None
    with tarfile.open(tar, "r:") as opened:
        for member in opened:
            parts = KEY_AND_FIELD.fullmatch(member.name)
            if parts is None or not member.isreg() or member.issparse():
                continue
            if parts[1] != key_before:
                rows.append({})
                key_before = parts[1]
            rows[-1][parts[2].lower()] = Place(member.offset_data, member.size)
        if 0 < tar.stat().st_size - opened.offset < tarfile.BLOCKSIZE:  # which tarfile takes for the end
            raise tarfile.ReadError("unexpected end of data")
    return rows


def cell(file: BinaryIO, places: dict[str, Place], name: str) -> Any:
    """A column of a row: an image's bytes, a text, or what the row's JSON has under that name; None where there is none."""
    if name in places and name in IMAGE_FIELDS:
        return read_member(file, places[name])
    if name not in places:
        return read_json_member(file, places["json"]).get(name) if "json" in places else None
    try:
        return read_member(file, places[name]).decode()
    except UnicodeDecodeError:
        return None


def read_json_member(file: BinaryIO, place: Place) -> dict[str, Any]:
    """The JSON object at a place; an empty one where there is none."""
    try:
        record = json.loads(read_member(file, place))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def read_member(file: BinaryIO, place: Place) -> bytes:
    """The bytes at a place."""
    file.seek(place.offset)
    return file.read(place.size)
