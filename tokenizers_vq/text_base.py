"""Text as spans of symbols, and back: what every text tokenizer whose codes cover a span each does before and after it codes."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .base import DiscreteTokenizer, DiscreteTokenizerConfig
from .validation import check_choice, check_counts

logger = logging.getLogger(__name__)
IGNORE_INDEX = -100  # the symbol at a position that does not matter, as in torch's cross entropy
SPAN_UNITS = ("bytes", "words", "word")
WORD_PATTERN = re.compile(rb" ?\w+| ?[^\w\s]+|\s+")
UNKNOWN_BYTE = ord("?")  # stands for every byte outside the alphabet


class TextSpanConfig(DiscreteTokenizerConfig):
    """Settings of a `TextSpanTokenizer`.

    Attributes:
        max_length: bytes that all spans together have room for; longer texts are cut.
        span_length: bytes that one code covers, a divisor of `max_length`; `max_length` itself is the whole text.
        span_unit: what a span is filled with: "bytes", whatever they are; "words", as many whole ones as fit, which is the shortest for
            running text; "word", a single one, which then stands alone in its span.
        alphabet: the byte values that the model tells apart, in order; none given: all 256. Others are read as "?".
    """

    max_length: int = 96
    span_length: int = 6
    span_unit: str = "bytes"
    alphabet: list[int] | None = None

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        if self.max_length % self.span_length:
            raise ValueError(f"max_length {self.max_length} is not a multiple of span_length {self.span_length}")
        check_choice("span_unit", self.span_unit, SPAN_UNITS)
        if self.alphabet is not None:
            check_alphabet(self.alphabet)


class TextSpanTokenizer(DiscreteTokenizer):
    """Codes that each cover a span of a text's bytes, one or more of them a span.

    Codes are `b (n s)`: the first of all spans, then the second of all. A span past the end of its text has code 0 throughout. Models
    define `encode_symbols` and `decode_with_mask`; the rest follows.
    """

    config: Any  # a `TextSpanConfig`; what kind of one, each model says
    main_input_name = "symbols"

    def __init__(self, config: TextSpanConfig):
        super().__init__(config)
        self.alphabet = list(range(256)) if config.alphabet is None else list(config.alphabet)
        self.symbol_of_byte = [
            self.alphabet.index(byte if byte in self.alphabet else UNKNOWN_BYTE) for byte in range(256)
        ]
        self.span_length, self.num_spans = config.span_length, config.max_length // config.span_length

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> codes `b (n s)`; ValueError for symbols of another shape, type or range."""
        raise NotImplementedError

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """What texts say, symbols `b t`, if no more is known of their codes `b (n s)` than the first few of each span.

        Args:
            codes: of all levels, or of the first of them. mask: which of them are known, booleans `b (n s)`.
        """
        raise NotImplementedError

    @property
    def codebook_size(self) -> int:
        """Values that a code can take."""
        return self.config.codebook_size

    @property
    def num_symbols(self) -> int:
        """Bytes of the alphabet, and the end of a text."""
        return len(self.alphabet) + 1

    @property
    def pad_symbol(self) -> int:
        """The symbol that fills a text up."""
        return len(self.alphabet)

    def texts_to_symbols(self, texts: Sequence[str]) -> Tensor:
        """Texts -> symbols `b t`, cut or filled up with `end`.

        Raises:
            ValueError: for one text that is in no list, and for a text that has no bytes: what is no string, or holds half a character.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got one: {texts!r:.60}")
        rows, count_truncated = [], 0
        for number, text in enumerate(texts):
            try:
                content = text.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise ValueError(f"text {number} is no whole Unicode text: {text!r:.60}") from error
            pieces = self.first_chunks(content)
            if len(pieces) > self.num_spans:
                count_truncated += 1
                pieces = self.first_chunks(whole_characters(b"".join(pieces[: self.num_spans])))
            spans = ([self.symbol_of_byte[byte] for byte in piece] for piece in pieces)
            row = [symbol for span in spans for symbol in span + [self.pad_symbol] * (self.span_length - len(span))]
            rows.append(row + [self.pad_symbol] * (self.config.max_length - len(row)))
        if count_truncated:
            logger.warning(
                "%d of %d texts are longer than %d spans and were cut", count_truncated, len(texts), self.num_spans
            )
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(texts), self.config.max_length)

    def first_chunks(self, content: bytes) -> list[bytes]:
        """Those of the pieces that there are spans for, and of a text that is cut one more: no work on the rest of a megabyte."""
        return list(islice(self.iter_chunks(content), self.num_spans + 1))

    def iter_chunks(self, content: bytes) -> Iterator[bytes]:
        """Bytes as what the spans of a text hold."""
        unit = self.config.span_unit
        words = [content] if unit == "bytes" else (match[0] for match in WORD_PATTERN.finditer(content))
        if unit == "words":
            words = merge_words(words, self.span_length)
        starts = ((word, first) for word in words for first in range(0, len(word), self.span_length))
        return (word[first : first + self.span_length] for word, first in starts)

    def count_spans(self, text: str) -> int:
        """Spans that hold a text and its end; more than `num_spans` where it will be cut."""
        pieces = self.first_chunks(text.encode())
        fits_exactly = len(pieces) == self.num_spans
        holds_end = self.config.span_unit == "bytes" and bool(pieces) and len(pieces[-1]) < self.span_length
        return len(pieces) + (not fits_exactly and not holds_end)

    def symbols_to_texts(self, symbols: Tensor) -> list[str]:
        """Symbols `b t` -> texts, each up to its end; bytes that are no UTF-8 show as replacement characters."""
        rows = zip(symbols, self.valid_mask(symbols) & (symbols != self.pad_symbol), strict=True)
        kept = (row[is_text].tolist() for row, is_text in rows)
        return [bytes(self.alphabet[symbol] for symbol in row).decode(errors="replace") for row in kept]

    def valid_mask(self, symbols: Tensor) -> Tensor:
        """Where symbols `b t` are a text or its end, and not merely what fills up; `b t` booleans."""
        if self.config.span_unit == "bytes":
            return before_first(symbols == self.pad_symbol)
        ends = rearrange(symbols == self.pad_symbol, "b (s t) -> b s t", t=self.span_length)
        return (before_first(ends) & before_first(ends[:, :, 0])[..., None]).flatten(1)

    def valid_spans(self, symbols: Tensor) -> Tensor:
        """Which spans of symbols `b t` hold any of the text or its end, `b s`."""
        return rearrange(self.valid_mask(symbols), "b (s t) -> b s t", t=self.span_length).any(dim=2)

    def check_symbols(self, symbols: Tensor) -> None:
        """ValueError for what is not `b t` integers of the alphabet or `end`."""
        if symbols.ndim != 2 or symbols.shape[1] != self.config.max_length or symbols.is_floating_point():
            raise ValueError(
                f"symbols must be `b {self.config.max_length}` integers, got {tuple(symbols.shape)} {symbols.dtype}"
            )
        if symbols.numel() and not (symbols.min() >= 0 and symbols.max() <= self.pad_symbol):
            raise ValueError(
                f"symbols must lie in 0..{self.pad_symbol}, got {int(symbols.min())}..{int(symbols.max())}"
            )

    def make_labels(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> what the spans shall hold, `(b s) t`: what merely fills up is free."""
        self.check_symbols(symbols)
        return rearrange(symbols.where(self.valid_mask(symbols), IGNORE_INDEX), "b (s t) -> (b s) t", s=self.num_spans)

    @torch.no_grad()
    def encode(self, texts: Any) -> Tensor:
        """Texts, or symbols `b t`, -> codes `b (n s)`."""
        symbols = texts if isinstance(texts, Tensor) else self.texts_to_symbols(texts)
        with torch.autocast(symbols.device.type, enabled=False):
            return self.encode_symbols(symbols)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Any:
        """Codes `b (n s)`, or the first few of each text's where prefixes decode, -> texts."""
        return self.symbols_to_texts(self.decode_symbols(codes))

    @torch.no_grad()
    def decode_symbols(self, codes: Tensor) -> Tensor:
        """Codes `b (n s)`, or the first few of each text's, -> symbols `b t`."""
        return self.decode_with_mask(*self.pad_to_stages(codes))

    @torch.no_grad()
    def decode_progressively(self, codes: Tensor) -> Iterator[Any]:
        """The texts after the first codes `b (n s)` of all spans, after the second and so on."""
        for symbols in self.decode_symbols_progressively(codes):
            yield self.symbols_to_texts(symbols)

    @torch.no_grad()
    def decode_symbols_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Symbols `b t` after each stage of the codes `b (n s)`, or of the first few of each text's."""
        whole, mask = self.pad_to_stages(codes)
        for last in range(self.num_spans, whole.shape[1] + 1, self.num_spans):
            yield self.decode_with_mask(whole[:, :last], mask[:, :last])

    def pad_to_stages(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `b (n s)`, or the first few, filled up to a code for each span; and which of them were mask, alike.

        Raises:
            ValueError: for codes of another number, type or range.
        """
        self.check_codes(codes, prefix=self.supports_prefix_decoding)
        whole = F.pad(codes.long(), (0, -codes.shape[1] % self.num_spans))
        mask = torch.arange(whole.shape[1], device=codes.device) < codes.shape[1]
        return whole, mask.expand(whole.shape)


def check_alphabet(alphabet: Sequence[int]) -> None:
    """Refuse what are no byte values, each once and in order, with `UNKNOWN_BYTE` among them."""
    check_counts("alphabet", alphabet, least=0)
    if sorted(set(alphabet)) != list(alphabet) or not set(alphabet) <= set(range(256)):
        raise ValueError(f"alphabet must be different byte values in order, got {alphabet}")
    if UNKNOWN_BYTE not in alphabet:
        raise ValueError(f"alphabet must hold {UNKNOWN_BYTE}, the question mark that stands for all other bytes")


def whole_characters(content: bytes) -> bytes:
    """UTF-8 without the half of a character at its end."""
    return content.decode(errors="ignore").encode()


def merge_words(words: Iterable[bytes], length: int) -> Iterator[bytes]:
    """Neighbouring words as one where they have at most `length` bytes together."""
    together = b""
    for word in words:
        if together and len(together) + len(word) > length:
            yield together
            together = b""
        together += word
    if together:
        yield together


def before_first(is_end: Tensor) -> Tensor:
    """Booleans `... t` -> where none before is true."""
    return is_end.cumsum(dim=-1) - is_end.long() == 0
