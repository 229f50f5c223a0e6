"""VQ-DRAW for text: coarse-to-fine codes of bytes, from a bidirectional refiner."""

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
from .refiners import DilatedConvRefiner, build_segments

# K-means needs no more texts, and its vectors `(s t v)` at most this number of values in memory.
NUM_INIT_TEXTS, MAX_INIT_VALUES = 2**14, 2**24


class VQDrawTextConfig(TextSpanConfig):
    """Settings of a `VQDrawForText`. Each span of a text has `num_stages` codes below `codebook_size`.

    `TextSpanConfig` has `max_length`, `span_length`, `span_unit` and `alphabet`. In the paper one span
    is the whole text. Short spans search many more combinations with the same bits: with 6 bytes and
    64 options, each stage costs one bit per byte.

    Attributes:
        num_stages: Number of stages (default 4).
        codebook_size: Options at each stage (default 64).
        hidden_channels: Channels of the refiner's blocks, see `DilatedConvRefiner` (default 128).
        feature_channels: Channels of its head's input (default 64).
        embedding_dim: Dimension of the space in which its steps are made (default 32).
        dilations: Dilations of its blocks.
        segment_length: Stages that share a refiner; 0 (default) = all stages.
        active_stages: Run this number of first stages only; 0 (default) = all.
        num_biased_stages: First stages whose options have learned biases; 0 (default) = all.
        aux_coeff: Weight of the mean error over options, see `VQDraw` for this and the next six.
        num_aux_options: Random options that estimate that mean (default 4); 0 = all options.
        final_coeff: Weight of the last stage's error (default 0).
        grad_decay: Fraction of the gradient removed between stages (default 0).
        epsilon: Probability of a random option in training (default 0).
        checkpoint_stages: Recompute stages in the backward pass to save memory (default false).
        replace_dead_options: Move options that are hardly chosen (default true).

    Raises:
        ValueError: If a setting is unknown, has another type or is out of range.

    Example:
        >>> config = VQDrawTextConfig(max_length=24, span_length=6, num_stages=2)
        >>> config.max_length // config.span_length * config.num_stages
        8
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
    """Text tokenizer with coarse-to-fine codes; any prefix decodes.

    Codes are `b (n s)`: those of all spans at the first stage, then at the second. Spans past the end
    of a text have code 0 at every stage.

    Args:
        config: Settings of the model.

    Example:
        >>> sizes = {"max_length": 12, "span_length": 6, "hidden_channels": 16, "dilations": [1]}
        >>> model = VQDrawForText(VQDrawTextConfig(num_stages=3, **sizes)).eval()
        >>> codes = model.encode(["a red fox", "two"])
        >>> codes.shape, model.code_shape
        (torch.Size([2, 6]), (3, 2))
        >>> codes.view(2, 3, 2)[1, :, 1]
        tensor([0, 0, 0])
    """

    config_class = VQDrawTextConfig
    config: VQDrawTextConfig

    def __init__(self, config: VQDrawTextConfig):
        super().__init__(config)
        self.stage_loss = CrossEntropyLoss(self.num_symbols)
        refiner = build_text_refiner(config, num_symbols=self.num_symbols, num_spans=self.num_spans)
        shape = self.span_length, self.num_symbols
        self.vqdraw = VQDraw.from_config(config, refiner, self.stage_loss, state_shape=shape, group_size=self.num_spans)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Reset the counters, which are not saved. Modules initialize their own weights."""
        if isinstance(module, VQDraw):
            module.reset_usage()

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Number of active stages, number of spans."""
        return (self.vqdraw.num_stages, self.num_spans)

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """One for each code: those of different stages are unrelated."""
        return (1,) * self.num_codes

    @property
    def supports_prefix_decoding(self) -> bool:
        """True: the first codes decode to a rough text."""
        return True

    @property
    def num_init_examples(self) -> int:
        """Number of texts for k-means at every stage."""
        return NUM_INIT_TEXTS

    def init_from_data(self, symbols: Tensor) -> None:
        """Initialize as a residual quantizer of symbols `b t`, see `VQDraw.init_from_data`."""
        spans = self.make_labels(symbols)
        spans = spans[(spans != IGNORE_INDEX).any(dim=1)]
        self.vqdraw.init_from_data(spans[: MAX_INIT_VALUES // (self.span_length * self.num_symbols)])

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Encode symbols `b t` to codes `b (n s)`."""
        return self._stage_major(self.vqdraw(self.make_labels(symbols)).codes)

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Decode codes `b (n s)` to symbols `b t`, ignoring those where `mask` is False."""
        *_, last = self._iter_states(codes, mask)
        return self._to_symbols(last)

    @torch.no_grad()
    def decode_symbols_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the symbols `b t` after each stage.

        Equals the plain form of the base class, which starts again for every stage; this one does
        all stages in one pass.
        """
        for state in self._iter_states(*self.pad_to_stages(codes)):
            yield self._to_symbols(state)

    def _iter_states(self, codes: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Yield the states of spans `(b s) t v` after each stage of the codes `b (n s)`.

        A span keeps its state from the last stage at which `mask`, `b (n s)`, is True.
        """
        span_codes, span_mask = (rearrange(each, "b (n s) -> (b s) n", s=self.num_spans) for each in (codes, mask))
        kept = self.vqdraw.initial_state(len(span_codes))
        with torch.autocast(codes.device.type, enabled=False):
            for stage, state in enumerate(self.vqdraw.decode_progressively(span_codes)):
                kept = torch.where(span_mask[:, stage, None, None], state, kept)
                yield kept

    def _to_symbols(self, state: Tensor) -> Tensor:
        """Convert states of spans `(b s) t v` to the most likely symbols `b (s t)`."""
        return rearrange(self.stage_loss.reconstruct(state), "(b s) t -> b (s t)", s=self.num_spans)

    def forward(self, symbols: Tensor) -> TokenizerOutput:
        """Compute the training loss, reconstruction `b t`, codes and metrics of symbols `b t`."""
        target = self.make_labels(symbols)
        output = self.vqdraw(target)
        predicted = self.stage_loss.reconstruct(output.state.detach())
        num_valid = (target != IGNORE_INDEX).sum()
        metrics = {
            "byte_accuracy": (predicted == target).sum() / num_valid,
            # The stage loss divides by the positions of a span; here by those that are not ignored.
            "nats_per_byte": output.best_error[:, -1].detach().sum() * self.span_length / num_valid,
        }
        reconstruction = rearrange(predicted, "(b s) t -> b (s t)", s=self.num_spans)
        return TokenizerOutput(self.vqdraw.loss(output), reconstruction, self._stage_major(output.codes), metrics)

    def _stage_major(self, codes: Tensor) -> Tensor:
        """Reorder codes of spans `(b s) n` to codes of texts `b (n s)`."""
        return rearrange(codes, "(b s) n -> b (n s)", s=self.num_spans)


def build_text_refiner(config: VQDrawTextConfig, *, num_symbols: int, num_spans: int) -> nn.Module:
    """Build one refiner for all stages, or one for each segment.

    Args:
        config: Settings of the model.
        num_symbols: Number of symbols, v.
        num_spans: Spans of a text, s.
    """
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
    return build_segments(build, config.num_stages, config.segment_length, active_stages=config.active_stages)
