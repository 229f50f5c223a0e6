"""Captions -> text tokens: what a text tokenizer is, and byte-level BPE or any tokenizer that Hugging Face has saved as one.

A text tokenizer here owns text and nothing else: marks like [SEP] and image codes are integers that the layout places, so whatever a
caption says, it is only text.
"""

import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, cast

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

from tokenizers_vq.loading import CONFIG_FILE, TEXT_FILES, first_line, read_json, resolve_folder

NUM_BYTES = 256
MAX_CHARACTERS_PER_TOKEN = 64  # a caption is cut to this many characters for each token kept, before any work on it


class TextTokenizer(Protocol):
    """Text to ids and back. It pickles to what the ids depend on and nothing else, so that caches are found again."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        ...

    def encode(
        self, captions: list[str], *, max_length: int | None = None, rows: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Ids of each caption, none of them reserved; where only `max_length` of them are wanted, few more are computed.

        Raises:
            ValueError: for a caption that is not text, with its number (that of `rows`, or its place in the list).
        """
        ...

    @property
    def max_ids(self) -> int:
        """The most ids that `encode` gives for any caption."""
        ...

    def lengths(self, captions: list[str], *, max_length: int) -> list[int]:
        """How many ids each caption takes; above `max_length` any number above it will do."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text that the ids stand for."""
        ...

    def state(self) -> bytes:
        """Everything that the ids depend on."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        ...


class SubwordTokenizer:
    """A fast tokenizer of transformers as a `TextTokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    @classmethod
    def train_bpe(cls, captions: Iterable[str], *, vocab_size: int = 4096) -> Self:
        """Learn byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): every text has ids, and they give it back.

        Raises:
            ValueError: for a `vocab_size` below the number of bytes.
        """
        if vocab_size < NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {NUM_BYTES}, an id for each byte, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        # A first word is the same token as elsewhere; the space comes before every text, so that the decoder can take it off again.
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=MAX_CHARACTERS_PER_TOKEN,
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(PreTrainedTokenizerFast(tokenizer_object=tokenizer))

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a saved tokenizer from a folder or the hub; ValueError where there is none."""
        try:
            folder = resolve_folder(name, kinds=TEXT_FILES)
            check_no_remote_code(folder)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), split_special_tokens=True, use_fast=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged tokenizer.json can make Rust panic, which is no Exception
            raise ValueError(f"cannot load a text tokenizer from {name}: {first_line(error)}") from error
        loaded = cls(tokenizer)
        if not any(loaded.encode([string.printable])):
            # What transformers makes of a folder with a model's config and no tokenizer beside it.
            raise ValueError(f"{name} holds no text tokenizer: what is there knows no letter")
        return loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        self.tokenizer.save_pretrained(str(folder))

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return len(self.tokenizer)

    def encode(
        self, captions: list[str], *, max_length: int | None = None, rows: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Ids of each caption, none of them reserved; where only `max_length` of them are wanted, few more are computed.

        Raises:
            ValueError: for a caption that is not text, with its number (that of `rows`, or its place in the list).
        """
        check_texts(captions, rows)
        if not captions:
            return []
        limit = None if max_length is None else (max_length + 1) * MAX_CHARACTERS_PER_TOKEN
        texts = [caption[:limit] for caption in captions]
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    @property
    def max_ids(self) -> int:
        """The most ids that `encode` gives for any caption: there is no limit."""
        return sys.maxsize

    def lengths(self, captions: list[str], *, max_length: int) -> list[int]:
        """How many ids each caption takes; above `max_length` any number above it will do."""
        return [len(ids) for ids in self.encode(captions, max_length=max_length)]

    def decode(self, ids: list[int]) -> str:
        """The text that the ids stand for."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def state(self) -> bytes:
        """Everything that the ids depend on: the tokenizer as JSON."""
        return self.tokenizer.backend_tokenizer.to_str().encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return subword_tokenizer, (self.state(),)


def subword_tokenizer(state: bytes) -> SubwordTokenizer:
    """Make a `SubwordTokenizer` again from its `state`."""
    backend = Tokenizer.from_str(state.decode())
    return SubwordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True))


def check_no_remote_code(folder: Path) -> None:
    """ValueError for a folder whose tokenizer is code that it brings along: transformers would ask whether to run it."""
    for file in (folder / "tokenizer_config.json", folder / CONFIG_FILE):
        settings = read_json(file) if file.exists() else {}
        if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(f"{file} asks for code of its own, which is not run")


def check_texts(captions: Sequence[object], rows: Sequence[int] | None = None) -> None:
    """`check_text` for each, with its number in `rows`, or its place."""
    for row, caption in zip(rows or range(len(captions)), captions, strict=True):
        check_text(caption, row)


@dataclass(frozen=True)
class ValidCaptions:
    """Those of some captions that `check_text` takes, each time anew, so that of many none is kept."""

    captions: Iterable[object]

    def __iter__(self) -> Iterator[str]:
        for caption in self.captions:
            with suppress(ValueError):
                check_text(caption, row=0)
                yield cast(str, caption)


def check_text(caption: object, row: int) -> None:
    """ValueError for a caption that is no text, or holds half a character (a lone surrogate), which has no bytes."""
    if not isinstance(caption, str):
        raise ValueError(f"row {row}: the caption is not text but {type(caption).__name__}: {caption!r}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"row {row}: the caption is no whole Unicode at character {error.start}") from error
