"""Loads captioned images from whatever DATA names on the command line.

A Parquet file or folder, webdataset tars, a folder of images with captions, the built-in shapes, or a hub name. Images
stay undecoded, so `load_image` alone decides how a file looks, and a broken one is named where it is used. Everything
else that is wrong is an error here.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from datasets import Image as ImageFeature

from .archive_readers import load_tars, read_images
from .archives import (
    SPLITS,
    MissingSplitError,
    archive_files,
    files_of_split,
    load_parquet,
    quiet_datasets,
    root_cause,
)
from .columns import CAPTION_NAMES, IMAGE_SUFFIXES, column_of_captions, column_of_images, missing_column

BUILT_IN_ROWS = 20_000
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_UNDECODED = ImageFeature(decode=False)
_FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".parquet", ".csv", ".json", ".jsonl", ".tar", ".txt")


def load_captioned_images(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    with_captions: bool = True,
    with_images: bool = True,
    max_samples: int | None = None,
) -> Dataset:
    """Load captioned images of any kind, or captions alone.

    Args:
        source: "shapes" (the built-in set, even if a file has that name), else a path if it exists, else a hub name.
        split: Name of the split. A single file is "train" and whatever its name begins with.
        image_column: Column of images; by default "image", or the only one with images. In a folder's metadata
            "file_name".
        caption_column: Column of captions; by default "caption", "text", or the only one with strings.
        with_captions: Require captions and include them.
        with_images: Require images and include them.
        max_samples: Number of rows to keep, from the start; None keeps all.

    Returns:
        A data set with the columns `image` (undecoded: "bytes" and "path"), `caption` (string), and `label` if the
        data has one. Images in tars are read from the tar each time.

    Raises:
        ValueError: In one line that names the file, column or row; `MissingSplitError` if there is no such split.
    """
    check_max_samples(max_samples)
    files = archive_files_of(source, split)
    if files and files[0].suffix == ".tar":
        rows = load_tars(
            files,
            image_column=image_column,
            caption_column=caption_column,
            with_images=with_images,
            with_captions=with_captions,
        )
    elif files:
        rows = load_parquet(files)
    else:
        rows = _open(source, split, image_column, caption_column, with_captions=with_captions, max_samples=max_samples)
    if len(rows) == 0:
        raise ValueError(f"{source}: no rows in split {split!r}")
    rows = rows.select(range(min(len(rows), max_samples or len(rows))))
    columns = {column_of_images(rows.features, image_column, source): "image"} if with_images else {}
    if with_captions:
        columns[column_of_captions(rows.features, caption_column, source)] = "caption"
    kept = ["label"] if "label" in rows.column_names and "label" not in columns else []
    changed = {old: new for old, new in columns.items() if old != new}
    rows = rows.select_columns([*columns, *kept]).rename_columns(changed)
    rows = rows.cast_column("image", _UNDECODED) if "image" in rows.column_names else rows
    rows = _with_text_checked(rows, source) if with_captions else rows
    return rows.with_transform(read_images) if files and files[0].suffix == ".tar" and with_images else rows


def check_max_samples(max_samples: int | None) -> None:
    """Check that a number of rows is None or at least 1."""
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")


def archive_files_of(source: str, split: str) -> list[Path]:
    """Return the Parquet files or tars of a source; none if it is of another kind."""
    is_path = source != "shapes" and os.path.exists(source)
    return archive_files(Path(os.path.abspath(source)), split) if is_path else []


def held_out_split(dataset: Dataset, *, share: float, max_samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set at random into training and held-out rows, both in their original order.

    Args:
        dataset: At least two rows.
        share: Fraction of the rows to hold out, between 0 and 1; at least one row is on either side.
        max_samples: Largest number of rows to hold out.
        seed: Seed of the choice.

    Returns:
        Training rows and held-out rows, the same for the same seed.

    Raises:
        ValueError: If there are fewer than two rows, or the share or number is out of range.
    """
    if len(dataset) < 2 or not 0 < share < 1 or max_samples < 1:
        raise ValueError(f"cannot hold out a share of {share}, at most {max_samples}, of {len(dataset)} rows")
    num_held_out = min(max(1, round(share * len(dataset))), max_samples, len(dataset) - 1)
    held_out = np.zeros(len(dataset), dtype=bool)
    held_out[np.random.default_rng(seed).choice(len(dataset), num_held_out, replace=False)] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _open(
    source: str, split: str, image: str | None, caption: str | None, *, with_captions: bool, max_samples: int | None
) -> Dataset:
    if source == "shapes":
        from .shapes import shapes_dataset

        return shapes_dataset(split, num_rows=max_samples or BUILT_IN_ROWS)
    if not os.path.exists(source):
        return _from_hub(source, split)
    path = Path(os.path.abspath(source))
    captions = () if not with_captions else (caption,) if caption else CAPTION_NAMES
    return _from_image_folder(path, split, file_key=image or "file_name", captions=captions)


def _from_hub(name: str, split: str) -> Dataset:
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith(_FILE_SUFFIXES):
        raise ValueError(f"{name}: no such file or folder")
    try:
        with quiet_datasets():
            return datasets.load_dataset(name, split=split)
    except Exception as error:  # network, permission, format, split: each has its own type
        reason = root_cause(error)
        if reason.startswith("Unknown split"):
            raise MissingSplitError(f"{name}: {reason}") from error
        raise ValueError(f"{name}: no such file or folder, and not from the hub: {reason}") from error


def _from_image_folder(folder: Path, split: str, *, file_key: str, captions: Sequence[str]) -> Dataset:
    splits = {name: [folder / name] for name in SPLITS if (folder / name).is_dir()} or {"train": [folder]}
    root = files_of_split(splits, split, folder)[0]
    images = _images_below(root)
    if not images:
        raise ValueError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}), Parquet files or tars in it")
    places = [place / name for place in (root, folder) for name in ("metadata.csv", "metadata.jsonl")]
    metadata = next((place for place in places if place.is_file()), None)
    if metadata is None:
        texts = {"caption": [_caption_next_to(image) for image in images]} if captions else {}
        return _dataset_of_paths("image", {"image": images, **texts})
    columns = _metadata_columns(metadata, root, file_key, captions)
    unlisted = sorted(set(images) - set(columns[file_key]))
    if captions and unlisted:
        raise ValueError(f"{unlisted[0]}: no caption, {metadata} has no row for it")
    return _dataset_of_paths(file_key, columns)


def _images_below(root: Path) -> list[str]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        shown = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        found += [os.path.join(folder, name) for name in shown]
    return sorted(found)


def _caption_next_to(image: str) -> str:
    try:
        return Path(image).with_suffix(".txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise ValueError(f"{image}: no caption, neither a .txt next to it nor a metadata.csv or .jsonl") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{image}: the .txt next to it cannot be read: {error}") from error


def _metadata_columns(metadata: Path, root: Path, file_key: str, captions: Sequence[str]) -> dict[str, list[Any]]:
    """Read the columns of the images below `root`, checked cell by cell, because CSV and JSON have no types."""
    caption_key, columns = None, {file_key: [], "label": []}
    for where, row in _metadata_rows(metadata):
        if not isinstance(row.get(file_key), str):
            raise ValueError(f"{where}: {missing_column(file_key, row)}")
        image = os.path.normpath(metadata.parent / row[file_key])
        if metadata.parent != root and root not in Path(image).parents:
            continue  # an image of another split
        if not os.path.exists(image):
            raise ValueError(f"{where}: no such file: {image}")
        columns[file_key].append(image)
        if captions:
            caption_key = caption_key or next((name for name in captions if name in row), captions[0])
            columns.setdefault(caption_key, []).append(_text_cell(row, caption_key, where))
        columns["label"].append(row.get("label"))
    return columns if any(columns["label"]) else {key: columns[key] for key in columns if key != "label"}


def _metadata_rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position of each row, for errors, and the row. Excel starts CSV files with a byte order mark."""
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            if metadata.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((f"{metadata}, line {reader.line_num}", row) for row in reader)
            else:
                lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
                yield from ((f"{metadata}, line {number}", dict(json.loads(line))) for number, line in lines)
    except (csv.Error, ValueError, TypeError) as error:
        raise ValueError(f"{metadata}: cannot be read: {error}") from error


def _text_cell(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise ValueError(f"{where}: {missing_column(key, row)}")
    if not isinstance(row[key], str):
        raise ValueError(f"{where}: {key!r} is {row[key]!r}, not text")
    return row[key]


def _dataset_of_paths(image_column: str, columns: Mapping[str, Sequence[Any]]) -> Dataset:
    rows = [{"bytes": None, "path": path} for path in columns[image_column]]
    return Dataset.from_dict({**columns, image_column: rows}).cast_column(image_column, _UNDECODED)


def _with_text_checked(rows: Dataset, source: str) -> Dataset:
    cells = rows.select_columns(["caption"]).with_format("arrow")[:]["caption"]
    is_text = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
    row = pc.index(cells.is_null(), True).as_py() if is_text else 0
    if row >= 0:
        raise ValueError(f"{source}: row {row}: its caption is {str(cells[row].as_py())[:60]}, not text")
    if rows.features["caption"] == Value("string"):
        return rows
    texts = cells.cast(pa.string()).to_pylist()  # `cast_column` would write a copy of all images
    return rows.remove_columns("caption").add_column("caption", texts, feature=Value("string"))


def load_images_or_paths(sources: list[str], *, split: str, num_images: int) -> list[Any]:
    """Load the first images of a data set, or return the image files themselves.

    Args:
        sources: One data set, or any number of image files.
        split: Split of the data set.
        num_images: Number of images to take of the data set.

    Returns:
        Undecoded images or paths, all of which `load_image` takes.
    """
    files = [Path(source) for source in sources]
    if all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return files
    if len(sources) > 1:
        raise ValueError(f"give one data set or several image files, got {', '.join(sources)}")
    return load_captioned_images(sources[0], split=split, with_captions=False, max_samples=num_images)["image"][:]
