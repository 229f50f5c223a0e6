"""What every id of the prior's sequence means; nothing else in the project knows an offset.

    [BOS] text ... [PAD] [SEP] image codes      an image of a caption
    [BOS] image codes [SEP] text ... [PAD]      a caption of an image, which its first [PAD] ends

Text ids come first and keep the values that the text tokenizer gave them; [BOS], [SEP] and [PAD] follow; image ids come last. The text
has a fixed length and pads are attended like any token, so there is no attention mask and every image code keeps its position.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.loading import read_json
from tokenizers_vq.validation import MAX_INT, is_integer

VOCABULARY_MULTIPLE = 64  # matrix kernels and tensor-parallel engines like the vocabulary in multiples of this
FILE_NAME = "layout.json"


def range_starts(groups: tuple[int, ...], size: int, device: torch.device | None = None) -> Tensor:
    """Where the range of each position starts, `n`, when groups of positions take ranges of this size in turn."""
    return torch.tensor([size * group for group, length in enumerate(groups) for _ in range(length)], device=device)


@dataclass(frozen=True)
class Segment:
    """A run of positions that carry codes of one kind.

    Attributes:
        name: "text" or "image".
        groups: how many positions in a row share a range of ids; the ranges of the groups follow one another.
        codebook_size: codes at each position, and ids in each range.
        offset: id of code 0 (of the first position).
    """

    name: str
    groups: tuple[int, ...]
    codebook_size: int
    offset: int

    @property
    def length(self) -> int:
        """Positions."""
        return sum(self.groups)

    @property
    def num_ids(self) -> int:
        """Ids that the segment takes of the vocabulary."""
        return self.codebook_size * len(self.groups)

    @property
    def ids(self) -> slice:
        """All of them, as rows of a table."""
        return slice(self.offset, self.offset + self.num_ids)

    def position_offsets(self, device: torch.device | None = None) -> Tensor:
        """Id of code 0 at each position, `n`."""
        return self.offset + range_starts(self.groups, self.codebook_size, device)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> ids `b n`."""
        return codes.long() + self.position_offsets(codes.device)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids `b n` -> codes `b n`; ValueError for an id that does not belong at its position."""
        codes = ids - self.position_offsets(ids.device)
        if ids.numel() and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(f"these are no {self.name} ids of this layout: {ids.flatten()[:8].tolist()}...")
        return codes


@dataclass(frozen=True)
class SequenceLayout:
    """The sequences `[BOS] text [SEP] image` and `[BOS] image [SEP] text`, and their vocabulary.

    Attributes:
        text_vocab_size: ids of the text tokenizer, 0 and up.
        text_length: positions for text; shorter captions are filled with [PAD].
        num_codes, codebook_size: of an image.
        codes_shared: whether all positions of an image share one range of ids (cells of a grid), or each has its own (stages).
        positions_per_codebook: how many positions in a row share a range, such as `(16, 64)` for two grids; where given, it decides, and it is None
            where `codes_shared` says the same.
    """

    text_vocab_size: int
    text_length: int
    num_codes: int
    codebook_size: int
    codes_shared: bool = True
    positions_per_codebook: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("text_vocab_size", "text_length", "num_codes", "codebook_size"):
            value = getattr(self, name)
            if not is_count(value):
                raise ValueError(
                    f"layout: {name} must be a whole number of at least 1 and at most {MAX_INT}, got {value!r}"
                )
        if not isinstance(self.codes_shared, bool):
            raise ValueError(f"layout: codes_shared must be true or false, got {self.codes_shared!r}")
        groups = self.positions_per_codebook
        if groups is None:
            groups = one_group_or_many(self.num_codes, shared=self.codes_shared)
        if not isinstance(groups, list | tuple) or not all(map(is_count, groups)) or sum(groups) != self.num_codes:
            raise ValueError(
                f"layout: positions_per_codebook must be whole numbers of at least 1 that sum to num_codes {self.num_codes}, got {groups!r}"
            )
        # One way to write each layout, and files of the two plain cases stay as they were before there were groups.
        object.__setattr__(self, "codes_shared", len(groups) == 1)
        said = one_group_or_many(self.num_codes, shared=self.codes_shared)
        object.__setattr__(self, "positions_per_codebook", None if tuple(groups) == said else tuple(groups))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings})"

    def settings(self) -> dict[str, Any]:
        """The fields, without groups where `codes_shared` says them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def for_tokenizers(cls, image_tokenizer: DiscreteTokenizer, *, text_vocab_size: int, text_length: int) -> Self:
        """The layout that fits an image tokenizer and a text vocabulary."""
        return cls(
            text_vocab_size=text_vocab_size,
            text_length=text_length,
            num_codes=image_tokenizer.num_codes,
            codebook_size=image_tokenizer.codebook_size,
            positions_per_codebook=image_tokenizer.positions_per_codebook,
        )

    def with_position_specific_ids(self) -> Self:
        """The same sequences with ids of their own for every position of an image."""
        return replace(self, codes_shared=False, positions_per_codebook=None)

    @property
    def bos_id(self) -> int:
        """Starts every sequence."""
        return self.text_vocab_size

    @property
    def sep_id(self) -> int:
        """Stands between text and image."""
        return self.text_vocab_size + 1

    @property
    def pad_id(self) -> int:
        """Fills the text to its length; a text of nothing else is the prompt without a caption."""
        return self.text_vocab_size + 2

    @property
    def text(self) -> Segment:
        """The positions of the caption."""
        return Segment("text", (self.text_length,), self.text_vocab_size, 0)

    @property
    def image(self) -> Segment:
        """The positions of the image."""
        groups = self.positions_per_codebook or one_group_or_many(self.num_codes, shared=self.codes_shared)
        return Segment("image", groups, self.codebook_size, self.text_vocab_size + 3)

    @property
    def prompt_length(self) -> int:
        """Positions up to and including [SEP]."""
        return self.text_length + 2

    @property
    def caption_prompt_length(self) -> int:
        """Positions up to and including [SEP] where the image comes first."""
        return self.num_codes + 2

    @property
    def sequence_length(self) -> int:
        """Positions of text, image and marks."""
        return self.prompt_length + self.num_codes

    @property
    def vocab_size(self) -> int:
        """All ids, rounded up to a multiple of 64."""
        used = self.image.offset + self.image.num_ids
        return math.ceil(used / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def text_dtype(self) -> np.dtype:
        """Smallest unsigned type that holds every text id and [PAD]."""
        return np.min_scalar_type(self.pad_id)

    @property
    def code_dtype(self) -> np.dtype:
        """Smallest unsigned type that holds every code of an image."""
        return np.min_scalar_type(self.codebook_size - 1)

    def pad_text(self, texts: list[list[int]]) -> np.ndarray:
        """Text ids of any lengths -> `b t`, cut or filled with [PAD]."""
        rows = np.full((len(texts), self.text_length), self.pad_id, dtype=self.text_dtype)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = ids[: self.text_length]
        return rows

    def prompt(self, text_ids: Tensor) -> Tensor:
        """Text `b t` -> `[BOS] text [SEP]`, `b s`."""
        if text_ids.ndim != 2 or text_ids.shape[1] != self.text_length:
            raise ValueError(f"text ids must be `b {self.text_length}`, got {tuple(text_ids.shape)}")
        return self._between_marks(text_ids.long())

    def sequence(self, text_ids: Tensor, codes: Tensor) -> Tensor:
        """Text `b t` and codes `b n` -> `[BOS] text [SEP] image`, `b s`."""
        return torch.cat([self.prompt(text_ids), self.image.codes_to_ids(codes)], dim=1)

    def caption_prompt(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> `[BOS] image [SEP]`, `b s`."""
        if codes.ndim != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"codes must be `b {self.num_codes}`, got {tuple(codes.shape)}")
        return self._between_marks(self.image.codes_to_ids(codes))

    def caption_sequence(self, text_ids: Tensor, codes: Tensor) -> Tensor:
        """Text `b t` and codes `b n` -> `[BOS] image [SEP] text`, `b s`."""
        return torch.cat([self.caption_prompt(codes), text_ids.long()], dim=1)

    def _between_marks(self, ids: Tensor) -> Tensor:
        """`[BOS] ids [SEP]`."""
        marks = ids.new_tensor([self.bos_id, self.sep_id]).expand(len(ids), 2)
        return torch.cat([marks[:, :1], ids, marks[:, 1:]], dim=1)

    def null_text_ids(self, num: int, device: torch.device | None = None) -> Tensor:
        """Text of the prompt that says nothing, `num t`."""
        return torch.full((num, self.text_length), self.pad_id, dtype=torch.int64, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `layout.json` into a folder."""
        Path(folder, FILE_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `layout.json` from a folder; ValueError where there is none or it is not one."""
        path = Path(folder, FILE_NAME)
        try:
            return cls(**read_json(path))
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a tok2img model folder: it has no {FILE_NAME}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a layout: {error}") from error


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1, and not beyond all use."""
    return is_integer(value) and 1 <= value <= MAX_INT


def one_group_or_many(num_codes: int, *, shared: bool) -> tuple[int, ...]:
    """The groups that `codes_shared` stands for."""
    return (num_codes,) if shared else (1,) * num_codes
