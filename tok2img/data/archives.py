"""Rows out of Parquet files and webdataset tars, and which of several files belong to a split."""

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
# What reading a damaged Parquet file or tar raises.
UNREADABLE = (pa.ArrowException, tarfile.TarError, EOFError, OSError)
_SPLIT_NAME = re.compile("|".join(SPLITS))


class MissingSplitError(ValueError):
    """Data has no split of a name."""


def packed_files(path: Path, split: str) -> list[Path]:
    """The Parquet files or else the tars of a split; none if it is a folder without either."""
    if path.is_file():
        if path.suffix not in (".parquet", ".tar"):
            raise ValueError(f"{path}: expected a folder, a .parquet or a .tar file")
        named = _SPLIT_NAME.match(path.name)
        return files_of_split({"train": [path]} | ({named[0]: [path]} if named else {}), split, path)
    found = sorted(file for file in path.rglob("*.parquet") if file.name != "metadata.parquet")
    found = found or sorted(path.rglob("*.tar"))
    by_split: dict[str, list[Path]] = {}
    for file in found:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not by_split.keys() & set(SPLITS):
        by_split = {"train": found}
    return files_of_split(by_split, split, path) if found else []


def _split_of(file: Path) -> str:
    """What the name of the file, or of its folder, begins with; an unknown beginning is a split of its own."""
    known = (_SPLIT_NAME.match(part) for part in reversed(file.parts))
    return next((match[0] for match in known if match), file.stem.split("-")[0])


def files_of_split(by_split: Mapping[str, list[Path]], split: str, where: Path) -> list[Path]:
    """The files of a split; MissingSplitError with the splits there are for another."""
    if split not in by_split:
        raise MissingSplitError(f"{where}: no split {split!r}, only {', '.join(sorted(by_split))}")
    return by_split[split]


def from_packed_files(files: Sequence[Path]) -> Dataset:
    """The rows of Parquet files or tars; ValueError that names the file for what cannot be read."""
    filled = [file for file in files if _num_entries(file) > 0]
    if not filled:
        raise ValueError(f"{files[0]}: no rows")
    is_parquet = filled[0].suffix == ".parquet"
    kind, patterns = "parquet" if is_parquet else "webdataset", [glob.escape(str(file)) for file in filled]
    try:
        with quiet_datasets():
            rows = datasets.load_dataset(kind, data_files={"train": patterns}, split="train")
    except Exception as error:  # as above
        culprit = next((file for file in filled if is_parquet and not _is_whole_parquet(file)), filled[0])
        raise ValueError(f"{culprit}: cannot be read: {root_cause(error)}") from error
    return rows if is_parquet else _without_json_prefix(rows)


def _num_entries(file: Path) -> int:
    try:
        if file.suffix == ".parquet":
            return pq.read_metadata(file).num_rows
        with tarfile.open(file) as tar:
            return sum(member.isfile() for member in tar)
    except UNREADABLE as error:
        raise ValueError(f"{file}: cannot be read as {file.suffix[1:]}: {root_cause(error)}") from error


def _is_whole_parquet(file: Path) -> bool:
    try:
        with pq.ParquetFile(file) as parquet:
            return sum(len(batch) for batch in parquet.iter_batches(batch_size=64)) == parquet.metadata.num_rows
    except (pa.ArrowException, OSError):
        return False


def _without_json_prefix(rows: Dataset) -> Dataset:
    """Webdataset JSON comes as one column of records: its keys become columns, unless a file has that extension."""
    rows = rows.flatten()
    names = {name: name.removeprefix("json.") for name in rows.column_names if name.startswith("json.")}
    return rows.rename_columns({old: new for old, new in names.items() if new not in rows.column_names})


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No log lines, since errors come as ValueError, and progress bars only where somebody looks at them."""
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
    """The first line of what caused an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
