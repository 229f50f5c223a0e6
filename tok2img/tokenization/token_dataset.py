"""A tokenized data set on disk: Parquet, the processor that made it, and a manifest that says which.

tokens/  manifest.json  train-00000.parquet ...  layout.json  image_tokenizer/  text_tokenizer/
"""

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokenizers_vq.distributed import get_rank

from ..atomic_io import (
    MANIFEST,
    commit_folder,
    remove_folder,
    remove_stale_temporaries,
    sha256_of,
    temporary_name,
    try_lock,
    write_atomically,
)
from ..data.streaming import CaptionedRows, DatasetRows
from .map_function import TokenizeBatch
from .processor import Tok2ImgProcessor
from .shards import TokenizationJob, build_manifest, remove_job_files, tokenize_shards

JOB_FILE = "job.json"
ROWS_PER_SHARD = 10_000


def save_tokens(
    data: Dataset | CaptionedRows,
    processor: Tok2ImgProcessor,
    folder: str | Path,
    *,
    num_proc: int = 1,
    on_error: str = "skip",
    part: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
    """Tokenize columns `image` and `caption` into a folder, which appears whole or not at all; a job that was killed goes on.

    What the same job has made of the same rows before is left as it is, unless it is damaged.

    Args:
        data: a data set of `datasets`, or what `stream_captioned_images` opens.
        on_error: "skip" leaves rows out that cannot be read, and lists them in the manifest; "raise" is a ValueError with the first.
        part: (i, n) does every n-th shard from the i-th on, in one of n jobs with the same folder. The last of them puts all together;
            of processes in a torch.distributed group only the first does, so it calls again after a barrier.

    Returns:
        The manifest: rows, rows skipped, captions cut, fingerprint of the processor, sha256 of each shard. None while other parts are
        still to be done.
    """
    check_output_folder(folder)
    if not len(data):
        raise ValueError("the data set is empty")
    target, alone = Path(folder), part == (0, 1)
    rows = DatasetRows(data) if isinstance(data, Dataset) else data
    job = TokenizationJob(
        rows, TokenizeBatch(processor), target.parent / f".{target.name}.partial", ROWS_PER_SHARD, on_error
    )
    settings = {"data": rows.fingerprint, "rows": len(data), "rows_per_shard": ROWS_PER_SHARD, "on_error": on_error}
    settings["fingerprint"] = processor.fingerprint()
    if alone:
        remove_stale_temporaries(target.parent, f"{target.name}.*")
        remove_stale_temporaries(job.folder)
    if (made := manifest_of(target, settings)) is not None:
        return made
    begin(job, settings, alone=alone)
    if not (job.folder / MANIFEST).is_file():
        try:
            tokenize_shards(job, range(part[0], job.num_shards, part[1]), num_proc=num_proc)
        except BaseException:
            if alone and not any(map(job.load_if_complete, range(job.num_shards))):
                remove_folder(job.folder)  # there is nothing in it to go on from
            raise
    if get_rank():  # transformers saves models from the first of processes that train together alone
        return None
    with try_lock(job.folder) as is_ours:
        return finalize(job, target, settings) if is_ours else None


def finalize(job: TokenizationJob, target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Give the folder of a job that is done its place: its manifest; None where shards are missing."""
    if not (job.folder / MANIFEST).is_file():
        shards = job.shards()
        if len(shards) < job.num_shards:
            return None
        manifest = build_manifest(job, shards) | {"fingerprint": settings["fingerprint"], "job": settings}
        job.work.processor.save_pretrained(job.folder)
        write_atomically(job.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    manifest = json.loads((job.folder / MANIFEST).read_bytes())
    remove_job_files(job, manifest["shards"])
    (job.folder / JOB_FILE).unlink(missing_ok=True)
    commit_folder(job.folder, target)
    return manifest


def manifest_of(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a job with these settings that is done, whose tokens are whole; None where there is none."""
    if read_json(folder / MANIFEST).get("job") != settings:
        return None
    try:
        return open_tokens(folder)[0]
    except ValueError:
        return None


def part_of(text: str) -> tuple[int, int]:
    """`i/n` as two numbers; ValueError for what is none."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ValueError(f"a part must be i/n with i from 0 to n - 1, got {text!r}")
    return int(first), int(count)


def shard_from_env() -> tuple[int, int]:
    """The part of this process among those that torchrun starts; all of it where it is alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def begin(job: TokenizationJob, settings: dict[str, Any], *, alone: bool) -> None:
    """Prepare the folder of a job: shards of the same job stay, those of another go, unless jobs beside this one may be making them."""
    if is_same_job(job.folder, settings):
        return
    if alone:
        remove_folder(job.folder)
    building = temporary_name(job.folder)
    write_atomically(building / JOB_FILE, json.dumps(settings).encode())
    try:
        building.rename(job.folder)
    except OSError as error:  # a job beside this one was quicker
        remove_folder(building)
        if not is_same_job(job.folder, settings):
            raise ValueError(f"{job.folder} holds parts of another job: remove it, or give another folder") from error


def is_same_job(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder is that of a job with these settings."""
    return settings in (read_json(folder / JOB_FILE), read_json(folder / MANIFEST).get("job"))


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def load_tokens(folder: str | Path) -> tuple[Dataset, Tok2ImgProcessor]:
    """Read a folder of tokens and the processor that made them; ValueError as in `open_tokens`."""
    manifest, processor = open_tokens(folder)
    return Dataset.from_parquet([str(Path(folder, name)) for name in manifest["shards"]]), processor  # type: ignore[reportReturnType]


def open_tokens(folder: str | Path) -> tuple[dict[str, Any], Tok2ImgProcessor]:
    """The manifest of a folder of tokens, all of which are there and whole, and the processor that made them.

    Raises:
        ValueError: for a folder that is none, a damaged shard, or tokenizers that are not those that made the tokens.
    """
    path = Path(folder, MANIFEST)
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        shards, fingerprint = dict(manifest["shards"]), manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no tokens: {MANIFEST} is missing or damaged; `tok2img tokenize` writes it"
        ) from error
    for name, checksum in shards.items():
        shard = Path(folder, name)
        if not shard.is_file() or sha256_of(shard) != checksum:
            raise ValueError(f"{shard} is missing or damaged: tokenize again")
    processor = Tok2ImgProcessor.from_pretrained(folder)
    if processor.fingerprint() != fingerprint:
        raise ValueError(f"{folder}: the tokenizers there are not those that made the tokens: tokenize again")
    return manifest, processor


def check_output_folder(folder: str | Path) -> None:
    """ValueError for a path that holds anything but tokens."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))):
        raise ValueError(f"{folder} is in use for something else: give another folder, or empty it")
