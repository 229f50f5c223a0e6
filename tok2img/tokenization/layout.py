"""Ids and positions of the prior's sequence. Nothing else in the project knows an offset.

    generate an image   [BOS] text ... [PAD] [SEP] image codes
    caption an image    [BOS] image codes [SEP] text ... [PAD]      the first [PAD] ends the caption

The vocabulary, from id 0:

    | text ids | [BOS] [SEP] [PAD] | image ids: one range of `codebook_size` per group of positions | unused |
    0          text_vocab_size     text_vocab_size + 3                                              vocab_size

Text ids keep the values of the text tokenizer. The text has a fixed length and its pads are
attended like any token. So no
attention mask is needed, and every image code has a fixed position.
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
    """Return the start of each position's range of ids, `n`: group i starts at i * `size`."""
    return torch.tensor([size * group for group, length in enumerate(groups) for _ in range(length)], device=device)


@dataclass(frozen=True)
class Segment:
    """Consecutive positions with codes of one kind.

    Attributes:
        name: "text" or "image".
        groups: Number of consecutive positions that share a range of ids, group by group. Ranges follow one another.
        codebook_size: Number of ids in each range.
        offset: Id of code 0 at the first position.
    """

    name: str
    groups: tuple[int, ...]
    codebook_size: int
    offset: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(self.groups)

    @property
    def num_ids(self) -> int:
        """Number of ids in all ranges."""
        return self.codebook_size * len(self.groups)

    @property
    def ids(self) -> slice:
        """All ids of the segment, as a slice of embedding rows."""
        return slice(self.offset, self.offset + self.num_ids)

    def position_offsets(self, device: torch.device | None = None) -> Tensor:
        """Return the id of code 0 at each position, `n`."""
        return self.offset + range_starts(self.groups, self.codebook_size, device)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Convert codes `b n` to ids `b n`."""
        return codes.long() + self.position_offsets(codes.device)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Convert ids `b n` to codes `b n`; ValueError for an id outside the range of its position."""
        codes = ids - self.position_offsets(ids.device)
        if ids.numel() and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(f"Expected {self.name} ids of this layout, got {ids.flatten()[:8].tolist()}...")
        return codes


@dataclass(frozen=True)
class SequenceLayout:
    """Layout of the sequences `[BOS] text [SEP] image` and `[BOS] image [SEP] text` and of their vocabulary.

    With 5 text ids, 3 text positions, and an image of 4 codes from a codebook of 8:

        position    0      1    2    3      4      5    6    7    8
        token     [BOS]   'a'  'b' [PAD]  [SEP]    image codes 3 0 7 7
        id          5      0    1    7      6     11    8   15   15

    Attributes:
        text_vocab_size: Number of ids of the text tokenizer, which start at 0.
        text_length: Number of text positions; shorter captions are padded with [PAD], longer ones truncated.
        num_codes: Number of codes of an image.
        codebook_size: Number of values of a code.
        codes_shared: True if all positions of an image share one range of ids (cells of a grid), False if each has its
            own (stages of VQ-DRAW).
        positions_per_codebook: Number of consecutive positions that share a range, such as `(16, 64)` for two grids.
            It takes precedence over `codes_shared` and is None where that says the same.

    Example:
        >>> import torch
        >>> layout = SequenceLayout(text_vocab_size=5, text_length=3, num_codes=4, codebook_size=8)
        >>> text_ids = torch.tensor([[0, 1, layout.pad_id]])
        >>> layout.sequence(text_ids, torch.tensor([[3, 0, 7, 7]]))
        tensor([[ 5,  0,  1,  7,  6, 11,  8, 15, 15]])
        >>> layout.image.ids_to_codes(torch.tensor([[11, 8, 15, 15]]))
        tensor([[3, 0, 7, 7]])
        >>> layout.vocab_size
        64
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
        # One canonical form for each layout, so that equal layouts compare equal and save the same file.
        object.__setattr__(self, "codes_shared", len(groups) == 1)
        implied = one_group_or_many(self.num_codes, shared=self.codes_shared)
        object.__setattr__(self, "positions_per_codebook", None if tuple(groups) == implied else tuple(groups))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings})"

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def for_tokenizers(cls, image_tokenizer: DiscreteTokenizer, *, text_vocab_size: int, text_length: int) -> Self:
        """Build the layout for an image tokenizer and a text vocabulary."""
        return cls(
            text_vocab_size=text_vocab_size,
            text_length=text_length,
            num_codes=image_tokenizer.num_codes,
            codebook_size=image_tokenizer.codebook_size,
            positions_per_codebook=image_tokenizer.positions_per_codebook,
        )

    def with_position_specific_ids(self) -> Self:
        """Return the same layout with a separate range of ids for every image position."""
        return replace(self, codes_shared=False, positions_per_codebook=None)

    @property
    def bos_id(self) -> int:
        """Id of [BOS], which starts every sequence."""
        return self.text_vocab_size

    @property
    def sep_id(self) -> int:
        """Id of [SEP], between text and image."""
        return self.text_vocab_size + 1

    @property
    def pad_id(self) -> int:
        """Id of [PAD], which fills up the text. A text of pads alone is the unconditional prompt."""
        return self.text_vocab_size + 2

    @property
    def text(self) -> Segment:
        """Segment of the caption."""
        return Segment("text", (self.text_length,), self.text_vocab_size, 0)

    @property
    def image(self) -> Segment:
        """Segment of the image codes."""
        groups = self.positions_per_codebook or one_group_or_many(self.num_codes, shared=self.codes_shared)
        return Segment("image", groups, self.codebook_size, self.text_vocab_size + 3)

    @property
    def prompt_length(self) -> int:
        """Number of positions up to and including [SEP]."""
        return self.text_length + 2

    @property
    def caption_prompt_length(self) -> int:
        """Number of positions up to and including [SEP] if the image comes first."""
        return self.num_codes + 2

    @property
    def sequence_length(self) -> int:
        """Number of positions of text, image and special tokens."""
        return self.prompt_length + self.num_codes

    @property
    def vocab_size(self) -> int:
        """Number of ids, rounded up to a multiple of 64."""
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
        """Pad or truncate lists of text ids to `b t`."""
        rows = np.full((len(texts), self.text_length), self.pad_id, dtype=self.text_dtype)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = ids[: self.text_length]
        return rows

    def prompt(self, text_ids: Tensor) -> Tensor:
        """Build `[BOS] text [SEP]`, `b s`, from text ids `b t`."""
        if text_ids.ndim != 2 or text_ids.shape[1] != self.text_length:
            raise ValueError(f"text ids must be `b {self.text_length}`, got {tuple(text_ids.shape)}")
        return self._add_bos_and_sep(text_ids.long())

    def sequence(self, text_ids: Tensor, codes: Tensor) -> Tensor:
        """Build `[BOS] text [SEP] image`, `b s`, from text ids `b t` and codes `b n`."""
        return torch.cat([self.prompt(text_ids), self.image.codes_to_ids(codes)], dim=1)

    def caption_prompt(self, codes: Tensor) -> Tensor:
        """Build `[BOS] image [SEP]`, `b s`, from codes `b n`."""
        if codes.ndim != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"codes must be `b {self.num_codes}`, got {tuple(codes.shape)}")
        return self._add_bos_and_sep(self.image.codes_to_ids(codes))

    def caption_sequence(self, text_ids: Tensor, codes: Tensor) -> Tensor:
        """Build `[BOS] image [SEP] text`, `b s`, from text ids `b t` and codes `b n`."""
        return torch.cat([self.caption_prompt(codes), text_ids.long()], dim=1)

    def _add_bos_and_sep(self, ids: Tensor) -> Tensor:
        """Put [BOS] before and [SEP] after ids: `b n` to `b s`."""
        special = ids.new_tensor([self.bos_id, self.sep_id]).expand(len(ids), 2)
        return torch.cat([special[:, :1], ids, special[:, 1:]], dim=1)

    def null_text_ids(self, num: int, device: torch.device | None = None) -> Tensor:
        """Return the text ids of `num` unconditional prompts, `b t`: pads alone."""
        return torch.full((num, self.text_length), self.pad_id, dtype=torch.int64, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `layout.json` into a folder."""
        Path(folder, FILE_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load `layout.json` from a folder; ValueError if it is missing or does not describe a layout."""
        path = Path(folder, FILE_NAME)
        try:
            return cls(**read_json(path))
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a tok2img model folder: it has no {FILE_NAME}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a layout: {error}") from error


def is_count(value: Any) -> bool:
    """Return True for a whole number from 1 to `MAX_INT`."""
    return is_integer(value) and 1 <= value <= MAX_INT


def one_group_or_many(num_codes: int, *, shared: bool) -> tuple[int, ...]:
    """Return the groups that `codes_shared` implies: one for all codes, or one for each."""
    return (num_codes,) if shared else (1,) * num_codes
