"""Finds the Parquet files and webdataset tars of a split, and loads Parquet files through `datasets`."""

import glob
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tokenizers_vq.loading import first_line

SPLITS = ("train", "validation", "test")
# Errors that damaged Parquet files and tars raise.
UNREADABLE = (pa.ArrowException, tarfile.TarError, EOFError, OSError)
_SPLIT_NAME = re.compile("|".join(SPLITS))


class MissingSplitError(ValueError):
    """A split that the data does not have."""


def archive_files(path: Path, split: str) -> list[Path]:
    """Find the Parquet files of a split, or else its tars.

    The split is what the name of a file, or of its folder, begins with. Without any such name all files are "train".

    Args:
        path: A file, or a folder that is searched with those below it.
        split: Name of the split.

    Returns:
        The files in order; none if the folder has neither kind.

    Raises:
        MissingSplitError: If there are files, but none of this split.
        ValueError: If `path` is a file of another kind.
    """
    if path.is_file():
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{path}: expected a folder, a .parquet or a .tar file")
        named = _SPLIT_NAME.match(path.name)
        return files_of_split({"train": [path]} | ({named[0]: [path]} if named else {}), split, path)
    found = sorted(file for file in path.rglob("*.parquet") if file.name != "metadata.parquet")
    found = found or sorted(path.rglob("*.tar"))
    by_split: dict[str, list[Path]] = {}
    for file in found:
        # The innermost name that begins with a known split decides; an unknown beginning is a split of its own.
        known = (_SPLIT_NAME.match(part) for part in reversed(file.relative_to(path).parts))
        name = next((match[0] for match in known if match), file.stem.split("-")[0])
        by_split.setdefault(name, []).append(file)
    if not by_split.keys() & set(SPLITS):
        by_split = {"train": found}
    return files_of_split(by_split, split, path) if found else []


def files_of_split(by_split: Mapping[str, list[Path]], split: str, where: Path) -> list[Path]:
    """Return the files of a split; MissingSplitError that names the existing splits if there is no such split."""
    if split not in by_split:
        raise MissingSplitError(f"{where}: no split {split!r}, only {', '.join(sorted(by_split))}")
    return by_split[split]


def load_parquet(files: Sequence[Path]) -> Dataset:
    """Load Parquet files into the memory-mapped cache of `datasets`.

    Training reads rows in random order. In a Parquet file that would decompress a page for each row, so the copy pays.

    Raises:
        ValueError: If there are no rows, or a file is damaged; names the file.
    """
    filled = []
    for file in files:
        try:
            if pq.read_metadata(file).num_rows > 0:
                filled.append(file)
        except UNREADABLE as error:
            raise ValueError(f"{file}: cannot be read as parquet: {root_cause(error)}") from error
    if not filled:
        raise ValueError(f"{files[0]}: no rows")
    patterns = [glob.escape(str(file)) for file in filled]
    try:
        with quiet_datasets():
            return datasets.load_dataset("parquet", data_files={"train": patterns}, split="train")
    except Exception as error:  # `datasets` wraps errors in types of its own and does not name the file
        culprit = next((file for file in filled if not _is_whole_parquet(file)), filled[0])
        raise ValueError(f"{culprit}: cannot be read: {root_cause(error)}") from error


def _is_whole_parquet(file: Path) -> bool:
    try:
        with pq.ParquetFile(file) as parquet:
            return sum(len(batch) for batch in parquet.iter_batches(batch_size=64)) == parquet.metadata.num_rows
    except (pa.ArrowException, OSError):
        return False


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the log of `datasets`, whose errors become ValueErrors, and its progress bars unless on a terminal."""
    verbosity, had_bars = datasets.logging.get_verbosity(), not datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> str:
    """Return the first line of the innermost error in a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
