"""A tokenized data set on disk: Parquet shards, the processor that made them, and a manifest with checksums.

    tokens/  manifest.json  train-00000.parquet ...  layout.json  image_tokenizer/  text_tokenizer/

While a job runs, its shards lie in the hidden folder `.tokens.partial` next to it, which is renamed at the end.
"""

import json
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
    shard_index: int = 0,
    num_shards: int = 1,
) -> dict[str, Any] | None:
    """Tokenize captioned images into a folder, which appears complete or not at all.

    A killed job resumes where it stopped. A folder that the same job has finished is left as it is, unless it is
    damaged.

    Args:
        data: A data set with columns `image` and `caption`, or the result of `stream_captioned_images`.
        processor: Tokenizes both columns.
        folder: Output folder.
        num_proc: Number of worker processes.
        on_error: "skip" leaves out rows that cannot be read and lists them in the manifest; "raise" stops at the first.
        shard_index: Number of this process among those that share the job, as in `datasets.Dataset.shard`. It does
            every `num_shards`-th Parquet file.
        num_shards: Number of processes or machines that share the job. The last to finish completes the folder. In a
            torch.distributed group only rank 0 does that, so it calls again after a barrier.

    Returns:
        The manifest: rows, skipped rows, truncated captions, fingerprint of the processor and checksum of each
        Parquet file. None while other processes have files to do.

    Raises:
        ValueError: If the folder is used for something else, the data is empty, or a row cannot be read.
    """
    target, alone = Path(folder), num_shards == 1
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))):
        raise ValueError(f"{folder} exists and does not contain tokens. Choose another folder or empty it.")
    if not len(data):
        raise ValueError("the data set is empty")
    rows = DatasetRows(data) if isinstance(data, Dataset) else data
    work_folder = target.parent / f".{target.name}.partial"
    job = TokenizationJob(rows, TokenizeBatch(processor), work_folder, ROWS_PER_SHARD, on_error)
    settings = {"data": rows.fingerprint, "rows": len(data), "rows_per_shard": ROWS_PER_SHARD, "on_error": on_error}
    settings["fingerprint"] = processor.fingerprint()
    if alone:  # with other processes at work, these could be theirs
        remove_stale_temporaries(target.parent, f"{target.name}.*")
        remove_stale_temporaries(job.folder)
    if (manifest := manifest_if_complete(target, settings)) is not None:
        return manifest
    open_work_folder(job, settings, alone=alone)
    if not (job.folder / MANIFEST).is_file():
        try:
            tokenize_shards(job, range(shard_index, job.num_files, num_shards), num_proc=num_proc)
        except BaseException:
            if alone and not any(map(job.load_if_complete, range(job.num_files))):
                remove_folder(job.folder)  # there is nothing in it to resume from
            raise
    if get_rank():  # `save_pretrained` writes on rank 0 only
        return None
    with try_lock(job.folder) as is_locked:
        return finalize(job, target, settings) if is_locked else None


def finalize(job: TokenizationJob, target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Move a job whose shards are all complete to its target; returns its manifest, or None if shards are missing."""
    if not (job.folder / MANIFEST).is_file():
        shards = job.complete_shards()
        if len(shards) < job.num_files:
            return None
        manifest = build_manifest(job, shards) | {"fingerprint": settings["fingerprint"], "job": settings}
        job.work.processor.save_pretrained(job.folder)
        write_atomically(job.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    # From here on the manifest stands for the records: a kill while they are removed is resumed from it.
    manifest = json.loads((job.folder / MANIFEST).read_bytes())
    remove_job_files(job, manifest["shards"])
    (job.folder / JOB_FILE).unlink(missing_ok=True)
    commit_folder(job.folder, target)
    return manifest


def manifest_if_complete(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a finished job with these settings if its tokens are undamaged, else None."""
    if read_json_or_empty(folder / MANIFEST).get("job") != settings:
        return None
    try:
        return open_tokens(folder)[0]
    except ValueError:
        return None


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `i/n` into `shard_index` and `num_shards`.

    Raises:
        ValueError: If the text is not two numbers with 0 <= i < n.
    """
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ValueError(f"Expected a shard i/n with i from 0 to n - 1, got {text!r}.")
    return int(first), int(count)


def open_work_folder(job: TokenizationJob, settings: dict[str, Any], *, alone: bool) -> None:
    """Create the folder of a job, or keep it with its shards if it belongs to the same job.

    Args:
        job: The job to prepare.
        settings: Everything that the shards depend on.
        alone: True if no other process shares the job. Shards of another job are then removed; otherwise they are an
            error, because another process may be writing them.

    Raises:
        ValueError: If the folder belongs to another job.
    """
    if is_same_job(job.folder, settings):
        return
    if alone:
        remove_folder(job.folder)
    building = temporary_name(job.folder)
    write_atomically(building / JOB_FILE, json.dumps(settings).encode())
    try:
        building.rename(job.folder)
    except OSError as error:  # another process was faster
        remove_folder(building)
        if not is_same_job(job.folder, settings):
            raise ValueError(
                f"{job.folder} holds shards of another job. Remove it, or choose another folder."
            ) from error


def is_same_job(folder: Path, settings: dict[str, Any]) -> bool:
    """Return True if a folder belongs to a job with these settings."""
    return settings in (
        read_json_or_empty(folder / JOB_FILE),
        read_json_or_empty(folder / MANIFEST).get("job"),
    )


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing or damaged."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def load_tokens(folder: str | Path) -> tuple[Dataset, Tok2ImgProcessor]:
    """Load a folder of tokens and the processor that made them; ValueError as in `open_tokens`."""
    manifest, processor = open_tokens(folder)
    return Dataset.from_parquet([str(Path(folder, name)) for name in manifest["shards"]]), processor  # type: ignore[reportReturnType]


def open_tokens(folder: str | Path) -> tuple[dict[str, Any], Tok2ImgProcessor]:
    """Verify a folder of tokens and load its manifest and processor.

    Raises:
        ValueError: If the manifest is missing, a shard is damaged, or the tokenizers are not those that made the
            tokens.
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
