"""VQ-DRAW for text: bytes as codes from coarse to fine, seen from both sides."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput, check_choice, check_stages
from .errors import IGNORED, CrossEntropyError
from .refiners import DilatedConvRefiner, in_segments
from .vqdraw import ROWS_TO_START_FROM, VQDraw

logger = logging.getLogger(__name__)
VALUES_TO_START_FROM = 2**24
SPAN_UNITS = ("bytes", "words", "word")
WORD = re.compile(rb" ?\w+| ?[^\w\s]+|\s+")
UNKNOWN = ord("?")  # stands for every byte outside the alphabet


class VQDrawTextConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawForText`; a text takes `num_stages` codes of `codebook_size` options for each of its spans.

    Attributes:
        max_length: bytes that all spans together have room for; longer texts are cut.
        span_length: bytes that one code covers, a divisor of `max_length`; `max_length` itself is the whole text, as in the original.
            Short spans search far more combinations at the same bits: with 6 bytes and 64 options each stage costs one bit a byte.
        span_unit: what a span is filled with: "bytes", whatever they are; "words", as many whole ones as fit, which is the shortest for
            running text; "word", a single one, which then has the same codes wherever it stands.
        alphabet: the byte values that the model tells apart, in order; none given: all 256. Others are read as "?".
        hidden_channels, feature_channels, embedding_dim, dilations: size of the refiner, see `DilatedConvRefiner`.
        segment_length: stages that share a refiner; 0: all of them.
        active_stages: go through the first so many stages only; 0: all.
        num_biased_stages: stages with a learned bias for each option; 0: all.
        aux_coeff, num_aux_options, final_coeff, grad_decay, epsilon, checkpoint_stages, revive: see `VQDraw`.
    """

    model_type = "tok2img_vqdraw_text"
    may_be_zero = frozenset({"num_aux_options"})

    max_length: int = 96
    span_length: int = 6
    span_unit: str = "bytes"
    alphabet: list[int] | None = None
    num_stages: int = 4
    codebook_size: int = 64
    hidden_channels: int = 128
    feature_channels: int = 64
    embedding_dim: int = 32
    dilations: tuple[int, ...] = (1, 2, 4, 8, 1, 2, 4, 8)
    segment_length: int = 0
    active_stages: int = 0
    num_biased_stages: int = 0
    aux_coeff: float = 0.01
    num_aux_options: int = 4
    final_coeff: float = 0.0
    grad_decay: float = 0.0
    epsilon: float = 0.0
    checkpoint_stages: bool = False
    revive: bool = True

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        if self.max_length % self.span_length:
            raise ValueError(f"max_length {self.max_length} is no multiple of span_length {self.span_length}")
        check_choice("span_unit", self.span_unit, SPAN_UNITS)
        if self.alphabet is not None:
            check_alphabet(self.alphabet)
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations must be whole numbers of at least 1, got {self.dilations}")
        check_stages(
            self.num_stages,
            self.segment_length,
            active_stages=self.active_stages,
            num_biased_stages=self.num_biased_stages,
        )


class VQDrawForText(DiscreteTokenizer):
    """Codes that spell a text out more and more exactly; any prefix of them decodes.

    Codes are `b (n s)`: all spans at the first stage, then all at the second. A span past the end of its text has code 0 at every stage.
    """

    config_class = VQDrawTextConfig
    config: VQDrawTextConfig
    main_input_name = "symbols"

    def __init__(self, config: VQDrawTextConfig):
        super().__init__(config)
        self.alphabet = list(range(256)) if config.alphabet is None else list(config.alphabet)
        self.symbol_of_byte = [self.alphabet.index(byte if byte in self.alphabet else UNKNOWN) for byte in range(256)]
        self.span_length, self.num_spans = config.span_length, config.max_length // config.span_length
        self.error = CrossEntropyError(self.num_symbols)
        self.draw = VQDraw(
            build_refiner(config, num_symbols=self.num_symbols, num_spans=self.num_spans),
            self.error,
            state_shape=(self.span_length, self.num_symbols),
            num_stages=config.active_stages or config.num_stages,
            codebook_size=config.codebook_size,
            aux_coeff=config.aux_coeff,
            num_aux_options=config.num_aux_options,
            final_coeff=config.final_coeff,
            grad_decay=config.grad_decay,
            epsilon=config.epsilon,
            checkpoint_stages=config.checkpoint_stages,
            num_biased_stages=config.num_biased_stages or config.num_stages,
            num_joint=self.num_spans,
            revive=config.revive,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves; loading leaves what is not saved for us to set."""
        if isinstance(module, VQDraw):
            module.counts.zero_()

    @property
    def num_symbols(self) -> int:
        """Bytes of the alphabet, and the end of a text."""
        return len(self.alphabet) + 1

    @property
    def end(self) -> int:
        """The symbol that fills a text up."""
        return len(self.alphabet)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Active stages and spans."""
        return (self.draw.num_stages, self.num_spans)

    @property
    def codebook_size(self) -> int:
        """Options at each stage."""
        return self.config.codebook_size

    @property
    def code_groups(self) -> tuple[int, ...]:
        """Code 5 of one stage has nothing to do with code 5 of another."""
        return (1,) * self.num_codes

    @property
    def prefixes_decode(self) -> bool:
        """They do: codes go from coarse to fine."""
        return True

    def symbols(self, texts: Sequence[str]) -> Tensor:
        """Texts -> symbols `b t`, cut or filled up with `end`.

        Raises:
            ValueError: for a text that has no bytes: what is no string, or holds half a character.
        """
        rows, num_cut = [], 0
        for number, text in enumerate(texts):
            try:
                content = text.encode()
            except (AttributeError, UnicodeEncodeError) as error:
                raise ValueError(f"text {number} is no whole Unicode text: {text!r:.60}") from error
            pieces = self.pieces(content)
            if len(pieces) > self.num_spans:
                num_cut += 1
                pieces = self.pieces(whole_characters(b"".join(pieces[: self.num_spans])))
            spans = ([self.symbol_of_byte[byte] for byte in piece] for piece in pieces)
            row = [symbol for span in spans for symbol in span + [self.end] * (self.span_length - len(span))]
            rows.append(row + [self.end] * (self.config.max_length - len(row)))
        if num_cut:
            logger.warning("%d of %d texts are longer than %d spans and were cut", num_cut, len(texts), self.num_spans)
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(texts), self.config.max_length)

    def pieces(self, content: bytes) -> list[bytes]:
        """Bytes as what the spans of a text hold."""
        unit = self.config.span_unit
        words = [content] if unit == "bytes" else WORD.findall(content)
        if unit == "words":
            words = list(joined(words, self.span_length))
        starts = ((word, first) for word in words for first in range(0, len(word), self.span_length))
        return [word[first : first + self.span_length] for word, first in starts]

    def spans_of(self, text: str) -> int:
        """Spans that hold a text and its end; more than `num_spans` where it will be cut."""
        pieces = self.pieces(text.encode())
        fits_exactly = len(pieces) == self.num_spans
        holds_end = self.config.span_unit == "bytes" and bool(pieces) and len(pieces[-1]) < self.span_length
        return len(pieces) + (not fits_exactly and not holds_end)

    def texts(self, symbols: Tensor) -> list[str]:
        """Symbols `b t` -> texts, each up to its end; bytes that are no UTF-8 show as replacement characters."""
        rows = zip(symbols, self.live(symbols) & (symbols != self.end), strict=True)
        kept = (row[is_text].tolist() for row, is_text in rows)
        return [bytes(self.alphabet[symbol] for symbol in row).decode(errors="replace") for row in kept]

    def live(self, symbols: Tensor) -> Tensor:
        """Where symbols `b t` are a text or its end, and not merely what fills up; `b t` booleans."""
        if self.config.span_unit == "bytes":
            return up_to_first(symbols == self.end)
        ends = rearrange(symbols == self.end, "b (s t) -> b s t", t=self.span_length)
        return (up_to_first(ends) & up_to_first(ends[:, :, 0])[..., None]).flatten(1)

    def live_spans(self, symbols: Tensor) -> Tensor:
        """Which spans of symbols `b t` hold any of the text or its end, `b s`."""
        return rearrange(self.live(symbols), "b (s t) -> b s t", t=self.span_length).any(dim=2)

    def target(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> what the spans shall hold, `(b s) t`: what merely fills up is free."""
        if symbols.ndim != 2 or symbols.shape[1] != self.config.max_length or symbols.is_floating_point():
            raise ValueError(
                f"symbols must be `b {self.config.max_length}` integers, got {tuple(symbols.shape)} {symbols.dtype}"
            )
        if symbols.numel() and not (symbols.min() >= 0 and symbols.max() <= self.end):
            raise ValueError(f"symbols must lie in 0..{self.end}, got {int(symbols.min())}..{int(symbols.max())}")
        return rearrange(symbols.where(self.live(symbols), IGNORED), "b (s t) -> (b s) t", s=self.num_spans)

    @torch.no_grad()
    def encode(self, texts: Any) -> Tensor:
        """Texts, or symbols `b t`, -> codes `b (n s)`."""
        symbols = texts if isinstance(texts, Tensor) else self.symbols(texts)
        with torch.autocast(symbols.device.type, enabled=False):
            return self._by_stage(self.draw(self.target(symbols)).codes)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Any:
        """Codes `b (n s)`, or the first few of each text's, -> texts."""
        return self.texts(self.decode_symbols(codes))

    @torch.no_grad()
    def decode_symbols(self, codes: Tensor) -> Tensor:
        """Codes `b (n s)`, or the first few of each text's, -> symbols `b t`."""
        *_, last = self.symbols_after_stages(codes)
        return last

    @torch.no_grad()
    def decode_stages(self, codes: Tensor) -> Iterator[Any]:
        """The texts after each stage of the codes `b (n s)`, one after another."""
        for symbols in self.symbols_after_stages(codes):
            yield self.texts(symbols)

    @torch.no_grad()
    def symbols_after_stages(self, codes: Tensor) -> Iterator[Tensor]:
        """Symbols `b t` after each stage of the codes `b (n s)`, or of the first few of each text's."""
        self.check_codes(codes, prefix=True)
        num_given = codes.shape[1]
        whole = F.pad(codes.long(), (0, -num_given % self.num_spans))
        by_span = rearrange(whole, "b (n s) -> (b s) n", s=self.num_spans)
        before = self.draw.first_state(len(by_span))
        with torch.autocast(codes.device.type, enabled=False):
            for stage, state in enumerate(self.draw.states(by_span)):
                is_given = stage * self.num_spans + torch.arange(self.num_spans, device=codes.device) < num_given
                before = torch.where(is_given.repeat(len(codes))[:, None, None], state, before)
                yield rearrange(self.error.observed(before), "(b s) t -> b (s t)", s=self.num_spans)

    def forward(self, symbols: Tensor) -> TokenizerOutput:
        """Symbols `b t` -> loss, reconstruction (symbols `b t`), codes and metrics."""
        target = self.target(symbols)
        drawing = self.draw(target)
        observed = self.error.observed(drawing.state.detach())
        live = (target != IGNORED).sum()
        metrics = {
            "byte_accuracy": (observed == target).sum() / live,
            "nats_per_byte": drawing.chosen[:, -1].detach().sum() * self.span_length / live,
        }
        reconstruction = rearrange(observed, "(b s) t -> b (s t)", s=self.num_spans)
        return TokenizerOutput(self.draw.loss(drawing), reconstruction, self._by_stage(drawing.codes), metrics)

    def _by_stage(self, codes: Tensor) -> Tensor:
        """Codes of spans `(b s) n` -> codes of texts `b (n s)`."""
        return rearrange(codes, "(b s) n -> b (n s)", s=self.num_spans)

    @property
    def rows_to_start_from(self) -> int:
        """Enough for k-means at every stage."""
        return ROWS_TO_START_FROM

    def start_from_data(self, symbols: Tensor) -> None:
        """Start as a residual quantizer of `b t`; see `VQDraw.start_from_data`."""
        spans = self.target(symbols)
        spans = spans[(spans != IGNORED).any(dim=1)]
        self.draw.start_from_data(spans[: VALUES_TO_START_FROM // (self.span_length * self.num_symbols)])


def build_refiner(config: VQDrawTextConfig, *, num_symbols: int, num_spans: int) -> nn.Module:
    """One refiner for all stages, or one a segment."""
    build = partial(
        DilatedConvRefiner,
        codebook_size=config.codebook_size,
        num_symbols=num_symbols,
        num_spans=num_spans,
        span_length=config.max_length // num_spans,
        hidden_channels=config.hidden_channels,
        feature_channels=config.feature_channels,
        embedding_dim=config.embedding_dim,
        dilations=config.dilations,
    )
    return in_segments(build, config.num_stages, config.segment_length)


def check_alphabet(alphabet: Sequence[int]) -> None:
    """Refuse what are no byte values, each once and in order, with `UNKNOWN` among them."""
    if sorted(set(alphabet)) != list(alphabet) or not set(alphabet) <= set(range(256)):
        raise ValueError(f"alphabet must be different byte values in order, got {alphabet}")
    if UNKNOWN not in alphabet:
        raise ValueError(f"alphabet must hold {UNKNOWN}, the question mark that stands for all other bytes")


def whole_characters(content: bytes) -> bytes:
    """UTF-8 without the half of a character at its end."""
    return content.decode(errors="ignore").encode()


def joined(words: Iterable[bytes], length: int) -> Iterator[bytes]:
    """Neighbouring words as one where they have at most `length` bytes together."""
    together = b""
    for word in words:
        if together and len(together) + len(word) > length:
            yield together
            together = b""
        together += word
    if together:
        yield together


def up_to_first(is_end: Tensor) -> Tensor:
    """Booleans `... t` -> where none before is true."""
    return is_end.cumsum(dim=-1) - is_end.long() == 0
