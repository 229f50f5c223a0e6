"""Text tokenizers: their interface, byte-level BPE, and any saved fast tokenizer of Hugging Face.

A text tokenizer knows text only. Special tokens such as [SEP] and image codes are ids that the
layout adds, so no caption
can produce them.
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
MAX_CHARACTERS_PER_TOKEN = 64  # a caption is truncated to this many characters per wanted token before it is encoded


class TextTokenizer(Protocol):
    """Converts text to ids and back. It pickles to what the ids depend on alone, so that caches are found again.

    Example:
        >>> from tok2img import SubwordTokenizer, TextTokenizer
        >>> tokenizer: TextTokenizer = SubwordTokenizer.train_bpe(["a red circle"], vocab_size=260)
        >>> tokenizer.vocab_size
        260
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, which start at 0."""
        ...

    def encode(
        self, captions: list[str], *, max_length: int | None = None, rows: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Encode captions to ids, none of them reserved.

        Args:
            captions: Texts.
            max_length: Number of ids that are wanted of each; more may be returned.
            rows: Numbers of the captions, for errors; by default their positions.

        Raises:
            ValueError: If a caption is not text; names its row.
        """
        ...

    @property
    def max_ids(self) -> int:
        """Largest number of ids of a caption."""
        ...

    def lengths(self, captions: list[str], *, max_length: int) -> list[int]:
        """Count the ids of each caption; counts above `max_length` may be any number above it."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text."""
        ...

    def state(self) -> bytes:
        """Serialize everything that the ids depend on."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        ...


class SubwordTokenizer:
    """Adapts a fast tokenizer of transformers to `TextTokenizer`.

    Example:
        >>> from tok2img import SubwordTokenizer
        >>> tokenizer = SubwordTokenizer.train_bpe(["a red circle", "a red square"], vocab_size=265)
        >>> tokenizer.decode(tokenizer.encode(["a red square"])[0])
        'a red square'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer

    @classmethod
    def train_bpe(cls, captions: Iterable[str], *, vocab_size: int = 4096) -> Self:
        """Train byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), which encodes any text without loss.

        Raises:
            ValueError: for a `vocab_size` below the number of bytes.
        """
        if vocab_size < NUM_BYTES:
            raise ValueError(f"vocab_size must be at least {NUM_BYTES}, an id for each byte, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        # A first word is the same token as elsewhere; the space comes before every text, so that
        # the decoder can take it off again.
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
            # With `auto_map` transformers would offer to run code from the folder.
            for file in (folder / "tokenizer_config.json", folder / CONFIG_FILE):
                settings = read_json(file) if file.exists() else {}
                if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
                    raise ValueError(f"{file} asks for code of its own, which is not run")
            tokenizer = AutoTokenizer.from_pretrained(str(folder), split_special_tokens=True, use_fast=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged tokenizer.json can make Rust panic, which is not an Exception
            raise ValueError(f"cannot load a text tokenizer from {name}: {first_line(error)}") from error
        loaded = cls(tokenizer)
        if not any(loaded.encode([string.printable])):
            # What transformers makes of a folder with a model's config and no tokenizer next to it.
            raise ValueError(f"{name} holds no text tokenizer: what is there knows no letter")
        return loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        self.tokenizer.save_pretrained(str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of ids, which start at 0."""
        return len(self.tokenizer)

    def encode(
        self, captions: list[str], *, max_length: int | None = None, rows: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Encode captions to ids, none of them reserved.

        Args:
            captions: Texts.
            max_length: Number of ids that are wanted of each; more may be returned.
            rows: Numbers of the captions, for errors; by default their positions.

        Raises:
            ValueError: If a caption is not text; names its row.
        """
        check_texts(captions, rows)
        if not captions:
            return []
        limit = None if max_length is None else (max_length + 1) * MAX_CHARACTERS_PER_TOKEN
        texts = [caption[:limit] for caption in captions]
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    @property
    def max_ids(self) -> int:
        """Largest number of ids of a caption: unlimited."""
        return sys.maxsize

    def lengths(self, captions: list[str], *, max_length: int) -> list[int]:
        """Count the ids of each caption; counts above `max_length` may be any number above it."""
        return [len(ids) for ids in self.encode(captions, max_length=max_length)]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def state(self) -> bytes:
        """Serialize the tokenizer as JSON."""
        return self.tokenizer.backend_tokenizer.to_str().encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return subword_tokenizer, (self.state(),)


def subword_tokenizer(state: bytes) -> SubwordTokenizer:
    """Rebuild a `SubwordTokenizer` from its `state`."""
    backend = Tokenizer.from_str(state.decode())
    return SubwordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True))


def check_texts(captions: Sequence[object], rows: Sequence[int] | None = None) -> None:
    """Check each caption by `check_text`; `rows` are their numbers, by default their positions."""
    for row, caption in zip(rows or range(len(captions)), captions, strict=True):
        check_text(caption, row)


@dataclass(frozen=True)
class ValidCaptions:
    """Iterates over the valid captions without holding them in memory."""

    captions: Iterable[object]

    def __iter__(self) -> Iterator[str]:
        for caption in self.captions:
            with suppress(ValueError):
                check_text(caption, row=0)
                yield cast(str, caption)


def check_text(caption: object, row: int) -> None:
    """Check that a caption is text without unpaired surrogates, which have no UTF-8 bytes."""
    if not isinstance(caption, str):
        raise ValueError(f"row {row}: the caption is not text but {type(caption).__name__}: {caption!r}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"row {row}: the caption contains an unpaired surrogate at character {error.start}") from error
