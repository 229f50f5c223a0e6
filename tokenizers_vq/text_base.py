"""Base class of text tokenizers whose codes each cover a span of a text's bytes.

    text --UTF-8--> bytes --chunks--> one chunk per span, padded --alphabet--> symbols `b t` --model--> codes `b (n s)`

`s` is the number of spans, `n` the number of codes per span, and `t` the number of symbols of a
text: `s` times `span_length`.
"""

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
IGNORE_INDEX = -100  # label of a position without loss, the default of torch's cross entropy
SPAN_UNITS = ("bytes", "words", "word")
# Similar to that of GPT-2: the space before a word belongs to it.
WORD_PATTERN = re.compile(rb" ?\w+| ?[^\w\s]+|\s+")
UNKNOWN_BYTE = ord("?")  # replaces every byte outside the alphabet


class TextSpanConfig(DiscreteTokenizerConfig):
    """Settings of a `TextSpanTokenizer`.

    Attributes:
        max_length: Bytes of all spans together. Longer texts are truncated.
        span_length: Bytes of one span, a divisor of `max_length`. `max_length` itself means one
            span for the whole text.
        span_unit: Content of a span. "bytes" cuts texts anywhere. "words" packs as many whole words
            as fit, which gives the shortest sequences for running text. "word" puts each word into
            a span of its own.
        alphabet: Byte values that the model distinguishes, in ascending order; None means all 256.
            Other bytes are read as "?", which must be among them.

    Raises:
        ValueError: For a `span_length` that does not divide `max_length`, and an invalid unit or
            alphabet.

    Example:
        >>> from tokenizers_vq import TextSpanConfig
        >>> config = TextSpanConfig(max_length=24, span_length=6, span_unit="words")
        >>> config.max_length // config.span_length
        4
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
    """Base class of tokenizers with one or several codes per span of a text's bytes.

    Codes `b (n s)` are ordered coarse to fine: the first code of every span, then the second of
    every span, and so on. All codes of a span past the end of its text are 0.

    Subclasses define `encode_symbols` and `decode_with_mask`.

    Example:
        >>> from tokenizers_vq import VQVAEForText, VQVAETextConfig
        >>> config = VQVAETextConfig(max_length=12, span_length=4, hidden_channels=16, codebook_size=8)
        >>> model = VQVAEForText(config).eval()
        >>> model.texts_to_symbols(["a cat"]).tolist()
        [[97, 32, 99, 97, 116, 256, 256, 256, 256, 256, 256, 256]]
        >>> model.symbols_to_texts(model.texts_to_symbols(["a cat"]))
        ['a cat']
        >>> model.encode(["a cat", "a dog"]).shape  # 3 spans of 4 codes
        torch.Size([2, 12])
    """

    config: Any  # a `TextSpanConfig`; each subclass has its own
    main_input_name = "symbols"

    def __init__(self, config: TextSpanConfig):
        super().__init__(config)
        self.alphabet = list(range(256)) if config.alphabet is None else list(config.alphabet)
        self.symbol_of_byte = [
            self.alphabet.index(byte if byte in self.alphabet else UNKNOWN_BYTE) for byte in range(256)
        ]
        self.span_length, self.num_spans = config.span_length, config.max_length // config.span_length

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Encode symbols `b t` into codes `b (n s)`; a ValueError for another shape or range."""
        raise NotImplementedError

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Decode the known codes of each span into the most likely symbols.

        Args:
            codes: Codes `b (n s)`, all of them or the first stages.
            mask: True where a code is known, bool `b (n s)`; within a span the known codes come
                first.

        Returns:
            Symbols `b t`.
        """
        raise NotImplementedError

    @property
    def codebook_size(self) -> int:
        """Number of values that a code can take."""
        return self.config.codebook_size

    @property
    def num_symbols(self) -> int:
        """Size of the alphabet plus one, for the pad symbol."""
        return len(self.alphabet) + 1

    @property
    def pad_symbol(self) -> int:
        """Symbol that follows the end of a text, and of a word in its span."""
        return len(self.alphabet)

    def texts_to_symbols(self, texts: Sequence[str]) -> Tensor:
        """Convert texts to symbols, truncated (with a warning) or padded to `max_length`.

        Args:
            texts: A list of strings.

        Returns:
            Symbols `b t`, int64.

        Raises:
            ValueError: For a single string instead of a list, an element that is not a string, and
                a string with an unpaired surrogate, which has no UTF-8.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got one: {texts!r:.60}")
        rows, count_truncated = [], 0
        for number, text in enumerate(texts):
            try:
                content = text.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise ValueError(f"text {number} must be a string of valid Unicode, got {text!r:.60}") from error
            chunks = self.first_chunks(content)
            if len(chunks) > self.num_spans:
                count_truncated += 1
                # Drop the incomplete character that truncation may leave at the end, and split
                # again: in units of words the rest can be packed differently.
                truncated = b"".join(chunks[: self.num_spans]).decode(errors="ignore")
                chunks = self.first_chunks(truncated.encode())
            spans = ([self.symbol_of_byte[byte] for byte in chunk] for chunk in chunks)
            row = [symbol for span in spans for symbol in span + [self.pad_symbol] * (self.span_length - len(span))]
            rows.append(row + [self.pad_symbol] * (self.config.max_length - len(row)))
        if count_truncated:
            logger.warning(
                "%d of %d texts are longer than %d spans and were truncated",
                count_truncated,
                len(texts),
                self.num_spans,
            )
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(texts), self.config.max_length)

    def first_chunks(self, content: bytes) -> list[bytes]:
        """Return at most `num_spans + 1` chunks: one more than fit, to detect truncation.

        The rest of a long text is not split: a caption may have a megabyte.
        """
        return list(islice(self.iter_chunks(content), self.num_spans + 1))

    def iter_chunks(self, content: bytes) -> Iterator[bytes]:
        """Yield the bytes that each span holds, at most `span_length` of them."""
        unit = self.config.span_unit
        words = [content] if unit == "bytes" else (match[0] for match in WORD_PATTERN.finditer(content))
        if unit == "words":
            words = merge_words(words, self.span_length)
        starts = ((word, first) for word in words for first in range(0, len(word), self.span_length))
        return (word[first : first + self.span_length] for word, first in starts)

    def count_spans(self, text: str) -> int:
        """Return the number of spans of a text with its end; above `num_spans` if truncated."""
        chunks = self.first_chunks(text.encode())
        # The end of a text needs a pad symbol: a free place in the last span, or else a span of its
        # own. A text that fills all spans needs none.
        fits_exactly = len(chunks) == self.num_spans
        holds_end = self.config.span_unit == "bytes" and bool(chunks) and len(chunks[-1]) < self.span_length
        return len(chunks) + (not fits_exactly and not holds_end)

    def symbols_to_texts(self, symbols: Tensor) -> list[str]:
        """Convert symbols `b t` to texts, each up to its end; invalid UTF-8 becomes U+FFFD."""
        is_text = self.valid_mask(symbols) & (symbols != self.pad_symbol)
        rows = (row[mask].tolist() for row, mask in zip(symbols, is_text, strict=True))
        return [bytes(self.alphabet[symbol] for symbol in row).decode(errors="replace") for row in rows]

    def valid_mask(self, symbols: Tensor) -> Tensor:
        """Return True where symbols `b t` are text or the first pad symbol after it, `b t`.

        In units of words every span has a first pad symbol, unless it is full.
        """
        if self.config.span_unit == "bytes":
            return before_first(symbols == self.pad_symbol)
        is_pad = rearrange(symbols == self.pad_symbol, "b (s t) -> b s t", t=self.span_length)
        return (before_first(is_pad) & before_first(is_pad[:, :, 0])[..., None]).flatten(1)

    def valid_spans(self, symbols: Tensor) -> Tensor:
        """Return True for spans of symbols `b t` with a part of the text or its end, `b s`."""
        return rearrange(self.valid_mask(symbols), "b (s t) -> b s t", t=self.span_length).any(dim=2)

    def check_symbols(self, symbols: Tensor) -> None:
        """Raise a ValueError unless symbols are integers `b t` in 0..pad_symbol."""
        if symbols.ndim != 2 or symbols.shape[1] != self.config.max_length or symbols.is_floating_point():
            raise ValueError(
                f"symbols must be `b {self.config.max_length}` integers, got {tuple(symbols.shape)} {symbols.dtype}"
            )
        if symbols.numel() and not (symbols.min() >= 0 and symbols.max() <= self.pad_symbol):
            raise ValueError(
                f"symbols must lie in 0..{self.pad_symbol}, got {int(symbols.min())}..{int(symbols.max())}"
            )

    def make_labels(self, symbols: Tensor) -> Tensor:
        """Return the labels of each span, `(b s) t`.

        They are the symbols `b t`, with `IGNORE_INDEX` for all pad symbols after the first.

        Raises:
            ValueError: For symbols of another shape, dtype or range.
        """
        self.check_symbols(symbols)
        labels = symbols.where(self.valid_mask(symbols), IGNORE_INDEX)
        return rearrange(labels, "b (s t) -> (b s) t", s=self.num_spans)

    @torch.no_grad()
    def encode(self, texts: Any) -> Tensor:
        """Encode texts.

        Args:
            texts: A list of strings, or symbols `b t`.

        Returns:
            Codes `b (n s)`, int64.

        Raises:
            ValueError: For texts that are not strings, and symbols of another shape, dtype or
                range.
        """
        symbols = texts if isinstance(texts, Tensor) else self.texts_to_symbols(texts)
        with torch.autocast(symbols.device.type, enabled=False):
            return self.encode_symbols(symbols)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Any:
        """Decode codes `b (n s)`, or a prefix if the model supports it, into a list of texts."""
        return self.symbols_to_texts(self.decode_symbols(codes))

    @torch.no_grad()
    def decode_symbols(self, codes: Tensor) -> Tensor:
        """Decode codes `b (n s)`, or a prefix if the model supports it, into symbols `b t`."""
        return self.decode_with_mask(*self.pad_to_stages(codes))

    @torch.no_grad()
    def decode_progressively(self, codes: Tensor) -> Iterator[Any]:
        """Yield the list of texts after the first code of every span, the second, and so on."""
        for symbols in self.decode_symbols_progressively(codes):
            yield self.symbols_to_texts(symbols)

    @torch.no_grad()
    def decode_symbols_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the symbols `b t` after each stage of codes `b (n s)` or a prefix of them."""
        padded, mask = self.pad_to_stages(codes)
        for end in range(self.num_spans, padded.shape[1] + 1, self.num_spans):
            yield self.decode_with_mask(padded[:, :end], mask[:, :end])

    def pad_to_stages(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Pad a prefix of codes with zeros to whole stages, a code for each span.

        Args:
            codes: Codes `b (n s)`, or a prefix of them if the model supports it.

        Returns:
            The padded codes `b (n s)`, and a mask of the same shape that is False for the padding.

        Raises:
            ValueError: For codes of another number, dtype or range.
        """
        self.check_codes(codes, prefix=self.supports_prefix_decoding)
        padded = F.pad(codes.long(), (0, -codes.shape[1] % self.num_spans))
        mask = torch.arange(padded.shape[1], device=codes.device) < codes.shape[1]
        return padded, mask.expand(padded.shape)


def check_alphabet(alphabet: Sequence[int]) -> None:
    """Raise a ValueError unless an alphabet is ascending byte values with `UNKNOWN_BYTE`."""
    check_counts("alphabet", alphabet, least=0)
    if sorted(set(alphabet)) != list(alphabet) or not set(alphabet) <= set(range(256)):
        raise ValueError(f"alphabet must be different byte values in order, got {alphabet}")
    if UNKNOWN_BYTE not in alphabet:
        raise ValueError(f"alphabet must hold {UNKNOWN_BYTE}, the question mark that stands for all other bytes")


def merge_words(words: Iterable[bytes], max_length: int) -> Iterator[bytes]:
    """Merge neighboring words greedily, up to `max_length` bytes together."""
    merged = b""
    for word in words:
        if merged and len(merged) + len(word) > max_length:
            yield merged
            merged = b""
        merged += word
    if merged:
        yield merged


def before_first(is_end: Tensor) -> Tensor:
    """Return True up to and including the first True of each row, bool `... t`."""
    return is_end.cumsum(dim=-1) - is_end.long() == 0
