"""Tokenizes a data set shard by shard, so that a job that is killed goes on where it was.

A shard is a fixed run of rows, written once and renamed, with a record beside it of what it holds and which rows were skipped. Nothing is
redone but what was under way: at most a shard for each worker.
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
BATCH_SIZE = 256


@dataclass(frozen=True)
class Shard:
    """What a shard holds.

    Attributes:
        rows: that were tokenized; skipped: the others, each with its number and the reason.
        sha256: of the file. num_truncated_captions: captions that were longer than the layout has room for.
    """

    rows: int
    sha256: str
    num_truncated_captions: int
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class TokenizationJob:
    """Rows, what tokenizes them, and where their shards go."""

    data: CaptionedRows
    work: TokenizeBatch
    folder: Path
    rows_per_shard: int
    on_error: str

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ON_ERROR)

    @property
    def num_shards(self) -> int:
        """Shards of all rows."""
        return -(-len(self.data) // self.rows_per_shard)

    def rows_of(self, number: int) -> range:
        """The rows of a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, len(self.data)))

    def file(self, number: int) -> Path:
        """Where the tokens of a shard lie."""
        return self.folder / f"train-{number:05d}.parquet"

    def record(self, number: int) -> Path:
        """Where it is written what a shard holds."""
        return self.file(number).with_suffix(".json")

    def load_if_complete(self, number: int) -> Shard | None:
        """What a shard holds that is there and whole."""
        try:
            shard = Shard(**json.loads(self.record(number).read_bytes()))
            return shard if sha256_of(self.file(number)) == shard.sha256 else None
        except (OSError, ValueError, TypeError):
            return None

    def shards(self) -> dict[str, Shard]:
        """What those shards hold that are there and whole, by the names of their files."""
        found = ((self.file(number).name, self.load_if_complete(number)) for number in range(self.num_shards))
        return {name: shard for name, shard in found if shard is not None}


def tokenize_shards(job: TokenizationJob, numbers: Sequence[int], *, num_proc: int = 1) -> None:
    """Tokenize those of the shards that are not there yet.

    Raises:
        ValueError: for a row that cannot be read, where the job does not skip such.
        RuntimeError: where workers are killed again and again.
    """
    missing = [number for number in numbers if job.load_if_complete(number) is None]
    total = sum(len(job.rows_of(number)) for number in numbers)
    left = sum(len(job.rows_of(number)) for number in missing)
    with tqdm(total=total, initial=total - left, desc="tokenize", unit=" images") as bar:
        if num_proc > 1 and len(missing) > 1:
            for num_rows in imap_unordered(partial(tokenize_shard, job), missing, num_proc=num_proc):
                bar.update(num_rows)
            return
        for number in missing:
            tokenize_shard(job, number, bar)


def tokenize_shard(job: TokenizationJob, number: int, bar: Any = None) -> int:
    """Tokenize the rows of one shard and put it in its place; their number."""
    rows = job.rows_of(number)
    text_ids, codes, skipped, count_truncated = [], [], [], 0
    for batch in decode_batches(job, rows):
        text_ids.append(batch.text_ids)
        codes.append(job.work.image_codes(batch))
        skipped += batch.skipped
        count_truncated += batch.count_truncated
        if bar is not None:
            bar.update(len(batch.text_ids) + len(batch.skipped))
    tokens = token_table(job.work.processor.layout, np.concatenate(text_ids), np.concatenate(codes))
    temporary = temporary_name(job.file(number))
    try:
        tokens.to_parquet(str(temporary))
        os.replace(temporary, job.file(number))
    finally:
        temporary.unlink(missing_ok=True)
    shard = Shard(len(tokens), sha256_of(job.file(number)), count_truncated, skipped)
    write_atomically(job.record(number), json.dumps(asdict(shard)).encode())
    return len(rows)


def decode_batches(job: TokenizationJob, rows: range) -> Iterator[DecodedBatch]:
    """Yield the rows in batches; the main process decodes the next batch in another one while this one is encoded.

    In a process and not in a thread, because decoding images holds Python's lock. Workers decode in line: there are
    as many of them as the caller wants processes.
    """
    num_batches = len(rows[::BATCH_SIZE])
    decode_from = partial(decode_batches_from, job, rows)
    return decode_from(0) if is_worker() or num_batches == 1 else iterate_in_process(decode_from, num_batches)


def decode_batches_from(job: TokenizationJob, rows: range, first_batch: int) -> Iterator[DecodedBatch]:
    """Read and decode the batches of `rows`, starting with batch number `first_batch`."""
    first = rows.start + first_batch * BATCH_SIZE
    for batch in job.data.batches(range(first, rows.stop), BATCH_SIZE):
        numbers = range(first, first + len(batch["image"]))
        yield job.work.read(batch, numbers, skip=job.on_error == "skip")
        first = numbers.stop


def build_manifest(job: TokenizationJob, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """The manifest of a job whose shards are all there; ValueError where no row at all could be read."""
    skipped = [row for shard in shards.values() for row in shard.skipped]
    num_rows = sum(shard.rows for shard in shards.values())
    if not num_rows:
        remove_folder(job.folder)
        raise ValueError(f"no row of the data can be read: row {skipped[0][0]}: {skipped[0][1]}")
    return {
        "rows": num_rows,
        "num_truncated_captions": sum(shard.num_truncated_captions for shard in shards.values()),
        "skipped": [{"row": row, "reason": reason} for row, reason in skipped],
        "shards": {name: shard.sha256 for name, shard in shards.items() if shard.rows},
    }


def remove_job_files(job: TokenizationJob, kept: Collection[str]) -> None:
    """Leave only tokens in the folder of a job that is done: of its shards those that are `kept`, for others hold no row."""
    remove_stale_temporaries(job.folder)
    for number in range(job.num_shards):
        job.record(number).unlink(missing_ok=True)
        if job.file(number).name not in kept:
            job.file(number).unlink(missing_ok=True)
