"""Tokenizes a data set shard by shard, so that a killed job resumes where it stopped.

A shard is a Parquet file with the tokens of a fixed run of rows. It is written under a temporary name and renamed; a
record next to it holds its checksum and the rows that were skipped. A kill costs at most one shard per worker.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from tokenizers_vq.validation import check_choice

from ..atomic_io import remove_folder, remove_stale_temporaries, sha256_of, temporary_name, write_atomically
from ..data.streaming import CaptionedRows
from .map_function import DecodedBatch, TokenizeBatch, token_table
from .worker_pool import imap_unordered, is_worker, iterate_in_process

ON_ERROR = ("skip", "raise")
BATCH_SIZE = 256  # rows that are decoded, encoded and passed between processes at a time


@dataclass(frozen=True)
class Shard:
    """Record of a finished shard.

    Attributes:
        rows: Number of rows that were tokenized.
        sha256: Checksum of the Parquet file.
        num_truncated_captions: Number of captions that were longer than the layout's text length.
        skipped: Number and reason of each row that could not be read.
    """

    rows: int
    sha256: str
    num_truncated_captions: int
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class TokenizationJob:
    """Rows, the function that tokenizes them, and the folder of their shards.

    Attributes:
        data: Captioned images.
        work: Tokenizes a batch of rows.
        folder: Folder for shards and their records.
        rows_per_shard: Number of rows of each shard but the last.
        on_error: "skip" leaves out rows that cannot be read; "raise" stops at the first.
    """

    data: CaptionedRows
    work: TokenizeBatch
    folder: Path
    rows_per_shard: int
    on_error: str

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ON_ERROR)

    @property
    def num_files(self) -> int:
        """Number of shards of all rows, over all processes."""
        return -(-len(self.data) // self.rows_per_shard)

    def rows_of(self, number: int) -> range:
        """Return the rows of a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, len(self.data)))

    def file(self, number: int) -> Path:
        """Return the path of a shard's Parquet file."""
        return self.folder / f"train-{number:05d}.parquet"

    def record(self, number: int) -> Path:
        """Return the path of a shard's record, which is written last."""
        return self.file(number).with_suffix(".json")

    def load_if_complete(self, number: int) -> Shard | None:
        """Return the shard's record if its file exists and matches its checksum, else None."""
        try:
            shard = Shard(**json.loads(self.record(number).read_bytes()))
            return shard if sha256_of(self.file(number)) == shard.sha256 else None
        except (OSError, ValueError, TypeError):
            return None

    def complete_shards(self) -> dict[str, Shard]:
        """Return the records of all complete shards by file name."""
        found = ((self.file(number).name, self.load_if_complete(number)) for number in range(self.num_files))
        return {name: shard for name, shard in found if shard is not None}


def tokenize_shards(job: TokenizationJob, numbers: Sequence[int], *, num_proc: int = 1) -> None:
    """Tokenize those of the shards `numbers` that are not complete yet.

    Args:
        job: The job they belong to.
        numbers: Shard numbers.
        num_proc: Number of worker processes; 1 encodes in this process and decodes images in another.

    Raises:
        ValueError: If a row cannot be read and the job does not skip such rows.
        RuntimeError: If workers are killed repeatedly.
    """
    missing = [number for number in numbers if job.load_if_complete(number) is None]
    num_rows = sum(len(job.rows_of(number)) for number in numbers)
    num_missing = sum(len(job.rows_of(number)) for number in missing)
    with tqdm(total=num_rows, initial=num_rows - num_missing, desc="tokenize", unit=" images") as bar:
        if num_proc > 1 and len(missing) > 1:
            for num_done in imap_unordered(partial(tokenize_shard, job), missing, num_proc=num_proc):
                bar.update(num_done)
            return
        for number in missing:
            tokenize_shard(job, number, bar)


def tokenize_shard(job: TokenizationJob, number: int, bar: Any = None) -> int:
    """Tokenize the rows of one shard, write its file, then its record.

    Args:
        job: The job it belongs to.
        number: Shard number.
        bar: Progress bar to advance batch by batch.

    Returns:
        Number of rows, skipped ones included.
    """
    rows = job.rows_of(number)
    text_ids, codes, skipped, num_truncated = [], [], [], 0
    # Another process decodes the next batch while this one encodes. A thread would not do, because
    # decoding images holds Python's lock. Workers decode in line: there are as many of them as the
    # caller wants processes.
    num_batches = len(rows[::BATCH_SIZE])
    decode_from = partial(decode_batches_from, job, rows)
    in_line = is_worker() or num_batches == 1
    for batch in decode_from(0) if in_line else iterate_in_process(decode_from, num_batches):
        text_ids.append(batch.text_ids)
        codes.append(job.work.image_codes(batch))
        skipped += batch.skipped
        num_truncated += batch.num_truncated
        if bar is not None:
            bar.update(len(batch.text_ids) + len(batch.skipped))
    tokens = token_table(job.work.processor.layout, np.concatenate(text_ids), np.concatenate(codes))
    temporary = temporary_name(job.file(number))
    try:
        tokens.to_parquet(str(temporary))
        os.replace(temporary, job.file(number))
    finally:
        temporary.unlink(missing_ok=True)
    # The record comes second: a kill in between leaves a file without a record, which counts as missing.
    shard = Shard(len(tokens), sha256_of(job.file(number)), num_truncated, skipped)
    write_atomically(job.record(number), json.dumps(asdict(shard)).encode())
    return len(rows)


def decode_batches_from(job: TokenizationJob, rows: range, first_batch: int) -> Iterator[DecodedBatch]:
    """Read and decode the batches of `rows`, starting with batch number `first_batch`."""
    first = rows.start + first_batch * BATCH_SIZE
    for batch in job.data.batches(range(first, rows.stop), BATCH_SIZE):
        numbers = range(first, first + len(batch["image"]))
        yield job.work.read(batch, numbers, skip=job.on_error == "skip")
        first = numbers.stop


def build_manifest(job: TokenizationJob, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Build the manifest of a job from the records of all its shards; ValueError if every row was skipped."""
    skipped = [row for shard in shards.values() for row in shard.skipped]
    num_rows = sum(shard.rows for shard in shards.values())
    if not num_rows:
        remove_folder(job.folder)
        raise ValueError(f"none of the rows can be read; row {skipped[0][0]}: {skipped[0][1]}")
    return {
        "rows": num_rows,
        "num_truncated_captions": sum(shard.num_truncated_captions for shard in shards.values()),
        "skipped": [{"row": row, "reason": reason} for row, reason in skipped],
        "shards": {name: shard.sha256 for name, shard in shards.items() if shard.rows},
    }


def remove_job_files(job: TokenizationJob, kept: Collection[str]) -> None:
    """Remove records, temporary files and empty shards of a finished job; keep the shards named in `kept`."""
    remove_stale_temporaries(job.folder)
    for number in range(job.num_files):
        job.record(number).unlink(missing_ok=True)
        if job.file(number).name not in kept:
            job.file(number).unlink(missing_ok=True)
