"""A tokenized data set on disk: Parquet, the processor that made it, and a manifest that says which.

tokens/  manifest.json  train-00000.parquet ...  layout.json  image_tokenizer/  text_tokenizer/
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .dataset import tokenize_dataset
from .processing import Tok2ImgProcessor
from .text import SubwordTokenizer, TextTokenizer
from .whole_files import whole_folder

MANIFEST = "manifest.json"
ROWS_PER_SHARD = 100_000
MAX_TEXT_LENGTH = 64


def fit_text(
    captions: list[str], *, text_tokenizer: TextTokenizer | None = None, vocab_size: int = 4096, text_length: int = 0
) -> tuple[TextTokenizer, int]:
    """A text tokenizer for these captions (BPE learned from them when none is given) and the text length that holds them.

    Args:
        text_length: 0 means as many tokens as the longest caption has, 64 at most.
    """
    text_tokenizer = text_tokenizer or SubwordTokenizer.train_bpe(captions, vocab_size=vocab_size)
    if text_length:
        return text_tokenizer, text_length
    lengths = text_tokenizer.lengths(sorted(set(captions)), max_length=MAX_TEXT_LENGTH)
    return text_tokenizer, min(MAX_TEXT_LENGTH, text_tokenizer.max_ids, max(1, *lengths))


def save_tokens(
    data: Dataset, processor: Tok2ImgProcessor, folder: str | Path, *, num_proc: int | None = None
) -> dict[str, Any]:
    """Tokenize columns `image` and `caption` into a folder, which appears whole or not at all.

    Returns:
        The manifest: rows, captions that were cut, fingerprint of the processor, sha256 of each shard.
    """
    refuse_other_use(folder)
    tokens = tokenize_dataset(data, processor, num_proc=num_proc)
    with whole_folder(folder) as building:
        processor.save_pretrained(building)
        shards = {}
        for number, first in enumerate(range(0, len(tokens), ROWS_PER_SHARD)):
            path = building / f"train-{number:05d}.parquet"
            tokens.select(range(first, min(first + ROWS_PER_SHARD, len(tokens)))).to_parquet(str(path))
            shards[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = {
            "rows": len(tokens),
            "captions_cut": sum(processor.num_cut(list(captions)) for captions in caption_batches(data)),
            "fingerprint": processor.fingerprint(),
            "shards": shards,
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def load_tokens(folder: str | Path) -> tuple[Dataset, Tok2ImgProcessor]:
    """Read a folder of tokens and the processor that made them.

    Raises:
        ValueError: for a folder that is none, a damaged shard, or tokenizers that are not those that made the tokens.
    """
    path = Path(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards, fingerprint = dict(manifest["shards"]), manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no tokens: {MANIFEST} is missing or damaged; `tok2img tokenize` writes it"
        ) from error
    for name, checksum in shards.items():
        shard = Path(folder, name)
        if not shard.is_file() or hashlib.sha256(shard.read_bytes()).hexdigest() != checksum:
            raise ValueError(f"{shard} is missing or damaged: tokenize again")
    processor = Tok2ImgProcessor.from_pretrained(folder)
    if processor.fingerprint() != fingerprint:
        raise ValueError(f"{folder}: the tokenizers there are not those that made the tokens: tokenize again")
    return Dataset.from_parquet([str(Path(folder, name)) for name in shards]), processor  # type: ignore[reportReturnType]


def caption_batches(data: Dataset, size: int = 10_000) -> Iterator[list[str]]:
    """The captions of a data set, so many at a time."""
    captions = data.select_columns(["caption"])
    return (captions[first : first + size]["caption"] for first in range(0, len(captions), size))


def refuse_other_use(folder: str | Path) -> None:
    """ValueError for a path that holds anything but tokens."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))):
        raise ValueError(f"{folder} is in use for something else: give another folder, or empty it")
