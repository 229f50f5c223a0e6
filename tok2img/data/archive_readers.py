"""Reads rows of Parquet files and webdataset tars in place, without a copy in a cache.

In memory are a few pages of a Parquet file, or one row of a tar and the index of its members.
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
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from .archives import UNREADABLE, root_cause
from .columns import CAPTION_NAMES, IMAGE_SUFFIXES, column_of_captions, column_of_images

BUFFER_BYTES = 2**20
ROWS_AT_ONCE = 64
LABEL = "label"
IMAGE_FIELDS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXT_FIELDS = ("txt", *CAPTION_NAMES)
# webdataset's rule: a name up to its first dot is the key of a row, the rest is the column.
KEY_AND_FIELD = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
# Path of an image inside a tar, as `load_tars` writes it: the tar, offset and size in bytes.
MEMBER_PATH = re.compile(r"(.*)#(\d+)\+(\d+)", re.DOTALL)


class TarMember(NamedTuple):
    """Position of a file's content in a tar, in bytes."""

    offset: int
    size: int


class ArchiveReader(Protocol):
    """Rows of one file."""

    path: Path

    def __len__(self) -> int: ...

    @property
    def features(self) -> Features:
        """Columns and their types."""
        ...

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the cells of some columns, row by row."""
        ...


def open_archive(file: Path) -> ArchiveReader:
    """Open a Parquet file or a tar; ValueError that names it if it is damaged."""
    try:
        return ParquetReader(file) if file.suffix == ".parquet" else TarReader(file)
    except UNREADABLE as error:
        raise ValueError(f"{file}: cannot be read as {file.suffix[1:]}: {root_cause(error)}") from error


class ParquetReader:
    """Rows of a Parquet file, read page by page."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = pq.read_metadata(path)

    def __len__(self) -> int:
        return self.metadata.num_rows

    @property
    def features(self) -> Features:
        """Columns and their types, as `datasets` reads them from the schema."""
        return Features.from_arrow_schema(self.metadata.schema.to_arrow_schema())

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the cells of some columns, row by row, from the row groups that hold them."""
        sizes = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = [int(group) for group in np.flatnonzero((starts[:-1] < rows.stop) & (starts[1:] > rows.start))]
        num_skipped = rows.start - int(starts[groups[0]])
        # Not pre-buffered: that would hold whole row groups, often the whole file, in memory.
        with pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(columns), use_threads=False)
            cells = (
                row for batch in batches for row in zip(*(batch[name].to_pylist() for name in columns), strict=True)
            )
            yield from islice(cells, num_skipped, num_skipped + len(rows))


class TarReader:
    """Rows of a webdataset tar: members whose names agree up to the first dot.

    Keys of a row's JSON member are columns of their own.
    """

    def __init__(self, path: Path):
        self.path, self.modified = path, path.stat().st_mtime_ns
        self.num_rows = len(self.members())

    def __len__(self) -> int:
        return self.num_rows

    def members(self) -> list[dict[str, TarMember]]:
        """Return the members of each row by column."""
        return index_tar(self.path, self.modified)

    @property
    def features(self) -> Features:
        """Columns of the first row and their types."""
        members = self.members()[0]
        with self.path.open("rb") as file:
            record = read_json_member(file, members["json"]) if "json" in members else {}
        texts = [name for name, value in record.items() if isinstance(value, str)]
        texts += [name for name in members if name in TEXT_FIELDS]
        images = {name: ImageFeature(decode=False) for name in members if name in IMAGE_FIELDS}
        return Features({name: Value("string") for name in texts} | images)

    def read(self, rows: range, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the cells of some columns, row by row; None for a cell that a row does not have."""
        with self.path.open("rb") as file:
            for members in self.members()[rows.start : rows.stop]:
                yield tuple(read_cell(file, members, name) for name in columns)


@lru_cache(maxsize=1)
def index_tar(tar: Path, modified: int) -> list[dict[str, TarMember]]:
    """Find the members of each row of a tar by reading its headers.

    Args:
        tar: Path of the tar.
        modified: Its modification time, part of the cache's key: a tar that is rewritten is indexed again.

    Raises:
        tarfile.TarError: If the tar is damaged or truncated.
    """
    del modified
    rows, last_key = [], None
    with tarfile.open(tar, "r:") as opened:
        for member in opened:
            parts = KEY_AND_FIELD.fullmatch(member.name)
            if parts is None or not member.isreg() or member.issparse():
                continue
            if parts[1] != last_key:
                rows.append({})
                last_key = parts[1]
            rows[-1][parts[2].lower()] = TarMember(member.offset_data, member.size)
        if 0 < tar.stat().st_size - opened.offset < tarfile.BLOCKSIZE:  # tarfile takes half a header for the end
            raise tarfile.ReadError("unexpected end of data")
    return rows


def read_cell(file: BinaryIO, members: dict[str, TarMember], name: str) -> Any:
    """Read a column of a row: bytes of an image, a text, or a value of the row's JSON; None if there is none."""
    if name in members and name in IMAGE_FIELDS:
        return read_member(file, members[name])
    if name not in members:
        return read_json_member(file, members["json"]).get(name) if "json" in members else None
    try:
        return read_member(file, members[name]).decode()
    except UnicodeDecodeError:
        return None


def read_json_member(file: BinaryIO, member: TarMember) -> dict[str, Any]:
    """Read a JSON object; an empty one if it is malformed or not an object."""
    try:
        record = json.loads(read_member(file, member))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """Read the bytes of a member."""
    file.seek(member.offset)
    return file.read(member.size)


def load_tars(
    files: Sequence[Path],
    *,
    image_column: str | None,
    caption_column: str | None,
    with_images: bool,
    with_captions: bool,
) -> Dataset:
    """Open tars for random access: captions and labels in memory, images as positions in the tars.

    `read_images` turns the positions into bytes, as the transform of the data set.

    Args:
        files: Tars whose rows follow one another.
        image_column: Column of images; None finds it.
        caption_column: Column of captions; None finds it.
        with_images: Include the column of images, as paths `TAR#OFFSET+SIZE`.
        with_captions: Include the column of captions; None where a row has none.

    Returns:
        The columns under their own names, and `label` if the first row's JSON has one.

    Raises:
        ValueError: If there are no rows, a tar is damaged, or a column is missing; names the tar.
    """
    columns: dict[str, list[Any]] = {}
    image = caption = None
    for reader in map(open_archive, files):
        if not len(reader):
            continue
        assert isinstance(reader, TarReader)
        features, source = reader.features, str(reader.path)
        # Every tar must have the columns of the first.
        if with_images:
            image = column_of_images(features, image or image_column, source)
        if with_captions:
            caption = column_of_captions(features, caption or caption_column, source)
        names = [LABEL] if caption in (None, LABEL) else [caption, LABEL]
        for members, cells in zip(reader.members(), reader.read(range(len(reader)), names), strict=True):
            for name, cell in zip(names, cells, strict=True):
                is_caption_without_text = name == caption and not isinstance(cell, str)
                columns.setdefault(name, []).append(None if is_caption_without_text else cell)
            if image:
                member = members.get(image)
                path = f"{reader.path}#{member.offset}+{member.size}" if member else None
                columns.setdefault(image, []).append({"bytes": None, "path": path})
    if not columns:
        raise ValueError(f"{files[0]}: no rows")
    if columns[LABEL][0] is None and LABEL not in (caption, image):
        del columns[LABEL]
    rows = Dataset.from_dict(columns)
    return rows.cast_column(image, ImageFeature(decode=False)) if image else rows


def read_images(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Replace images that lie in tars by their bytes; the transform of data sets from `load_tars`."""
    return columns | {name: [_read_image(cell) for cell in columns[name]] for name in ("image",) if name in columns}


def _read_image(cell: Any) -> Any:
    match = MEMBER_PATH.fullmatch((cell or {}).get("path") or "")
    if match is None:
        return cell
    with open(match[1], "rb") as file:
        return {"bytes": read_member(file, TarMember(int(match[2]), int(match[3]))), "path": cell["path"]}
