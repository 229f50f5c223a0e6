"""VQ-DRAW for text: bytes as codes from coarse to fine, seen from both sides."""

from collections.abc import Iterator
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from ..base import TokenizerOutput
from ..text_base import IGNORE_INDEX, TextSpanConfig, TextSpanTokenizer
from ..validation import check_counts, check_stages
from .core import VQDraw
from .losses import CrossEntropyLoss
from .refiners import DilatedConvRefiner, in_segments

TEXTS_TO_START_FROM, VALUES_TO_START_FROM = 2**14, 2**24


class VQDrawTextConfig(TextSpanConfig):
    """Settings of a `VQDrawForText`; a text takes `num_stages` codes of `codebook_size` options for each of its spans.

    Attributes:
        max_length, span_length, span_unit, alphabet: see `TextSpanConfig`. In the original one span is the whole text; short ones search
            far more combinations at the same bits: with 6 bytes and 64 options each stage costs one bit a byte.
        hidden_channels, feature_channels, embedding_dim, dilations: size of the refiner, see `DilatedConvRefiner`.
        segment_length: stages that share a refiner; 0: all of them.
        active_stages: go through the first so many stages only; 0: all.
        num_biased_stages: stages with a learned bias for each option; 0: all.
        aux_coeff, num_aux_options, final_coeff, grad_decay, epsilon, checkpoint_stages, revive: see `VQDraw`.
    """

    model_type = "tok2img_vqdraw_text"
    zero_allowed = frozenset({"num_aux_options"})

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
    replace_dead_options: bool = True

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_counts("dilations", self.dilations)
        check_stages(
            self.num_stages,
            self.segment_length,
            active_stages=self.active_stages,
            num_biased_stages=self.num_biased_stages,
        )


class VQDrawForText(TextSpanTokenizer):
    """Codes that spell a text out more and more exactly; any prefix of them decodes.

    Codes are `b (n s)`: all spans at the first stage, then all at the second. A span past the end of its text has code 0 at every stage.
    """

    config_class = VQDrawTextConfig
    config: VQDrawTextConfig

    def __init__(self, config: VQDrawTextConfig):
        super().__init__(config)
        self.stage_loss = CrossEntropyLoss(self.num_symbols)
        refiner = build_refiner(config, num_symbols=self.num_symbols, num_spans=self.num_spans)
        shape = self.span_length, self.num_symbols
        self.vqdraw = VQDraw.from_config(config, refiner, self.stage_loss, state_shape=shape, group_size=self.num_spans)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves; loading leaves what is not saved for us to set."""
        if isinstance(module, VQDraw):
            module.reset_usage()

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Active stages and spans."""
        return (self.vqdraw.num_stages, self.num_spans)

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Code 5 of one stage has nothing to do with code 5 of another."""
        return (1,) * self.num_codes

    @property
    def supports_prefix_decoding(self) -> bool:
        """They do: codes go from coarse to fine."""
        return True

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> codes `b (n s)`."""
        return self._by_stage(self.vqdraw(self.make_labels(symbols)).codes)

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Codes `b (n s)`, of which some are `mask`, -> symbols `b t`."""
        *_, last = self._states(codes, mask)
        return self._observed(last)

    @torch.no_grad()
    def decode_symbols_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """As the plain form, in one pass."""
        for state in self._states(*self.pad_to_stages(codes)):
            yield self._observed(state)

    def _states(self, codes: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """After each stage of the codes `b (n s)`, each span's state after the last of its codes that is `mask`, `(b s) t v`."""
        by_span, is_given = (rearrange(each, "b (n s) -> (b s) n", s=self.num_spans) for each in (codes, mask))
        before = self.vqdraw.initial_state(len(by_span))
        with torch.autocast(codes.device.type, enabled=False):
            for stage, state in enumerate(self.vqdraw.decode_progressively(by_span)):
                before = torch.where(is_given[:, stage, None, None], state, before)
                yield before

    def _observed(self, state: Tensor) -> Tensor:
        """States of spans `(b s) t v` -> the likeliest symbols `b (s t)`."""
        return rearrange(self.stage_loss.reconstruct(state), "(b s) t -> b (s t)", s=self.num_spans)

    def forward(self, symbols: Tensor) -> TokenizerOutput:
        """Symbols `b t` -> loss, reconstruction (symbols `b t`), codes and metrics."""
        target = self.make_labels(symbols)
        output = self.vqdraw(target)
        observed = self.stage_loss.reconstruct(output.state.detach())
        live = (target != IGNORE_INDEX).sum()
        metrics = {
            "byte_accuracy": (observed == target).sum() / live,
            "nats_per_byte": output.best_error[:, -1].detach().sum() * self.span_length / live,
        }
        reconstruction = rearrange(observed, "(b s) t -> b (s t)", s=self.num_spans)
        return TokenizerOutput(self.vqdraw.loss(output), reconstruction, self._by_stage(output.codes), metrics)

    def _by_stage(self, codes: Tensor) -> Tensor:
        """Codes of spans `(b s) n` -> codes of texts `b (n s)`."""
        return rearrange(codes, "(b s) n -> b (n s)", s=self.num_spans)

    @property
    def num_init_examples(self) -> int:
        """Enough for k-means at every stage."""
        return TEXTS_TO_START_FROM

    def init_from_data(self, symbols: Tensor) -> None:
        """Start as a residual quantizer of `b t`; see `VQDraw.init_from_data`."""
        spans = self.make_labels(symbols)
        spans = spans[(spans != IGNORE_INDEX).any(dim=1)]
        self.vqdraw.init_from_data(spans[: VALUES_TO_START_FROM // (self.span_length * self.num_symbols)])


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
    return in_segments(build, config.num_stages, config.segment_length, active_stages=config.active_stages)
