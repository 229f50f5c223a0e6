"""A 1-D VQ-VAE for text: the bytes of each span as a vector of a codebook, or as a sum of a few, seen from both sides.

Encoder and decoder are dilated convolutions over the whole text, so what a code says depends on its neighbours too.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..base import TokenizerOutput
from ..modules.dilated_conv import DilatedBlock
from ..modules.eval_mode import eval_mode
from ..quantization.code_usage import reset_code_usage
from ..quantization.configuration import QuantizerConfig, build_quantizer
from ..quantization.kmeans import MAX_INIT_VECTORS
from ..quantization.residual_quantizer import ResidualQuantizer
from ..text_base import IGNORE_INDEX, TextSpanConfig, TextSpanTokenizer
from ..validation import check_counts, skip_validation


class VQVAETextConfig(TextSpanConfig, QuantizerConfig):
    """Settings of a `VQVAEForText`; those of its quantizer: see `QuantizerConfig`.

    Attributes:
        max_length, span_length, span_unit, alphabet: see `TextSpanConfig`.
        hidden_channels, dilations: of the blocks of the encoder, and of those of the decoder.
        num_quantizers: codes of a span, where the quantizer is residual.
    """

    model_type = "tok2img_vqvae_text"

    hidden_channels: int = 192
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16)
    quantizer: str = "residual"
    codebook_size: int = 64

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_counts("dilations", self.dilations)


class DilatedStack(nn.Module):
    """Learned positions, and residual blocks that look further and further to both sides: `b t c` -> `b t c`."""

    def __init__(self, length: int, num_channels: int, dilations: tuple[int, ...]):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, num_channels))
        self.blocks = nn.ModuleList(DilatedBlock(1, num_channels, dilation) for dilation in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """`b t c` -> `b t c`."""
        x = x + self.positions
        for block in self.blocks:
            x = block(x, 0)
        return x


class VQVAEForText(TextSpanTokenizer):
    """Codes of spans from a codebook, or from several that add up; `forward` gives the cross entropy of bytes plus the codebooks' loss.

    With a residual quantizer any prefix of the codes decodes: in training texts stop after some of their levels (as in SoundStream,
    Zeghidour et al. 2021, section III.C).
    """

    config_class = VQVAETextConfig
    config: VQVAETextConfig

    def __init__(self, config: VQVAETextConfig):
        super().__init__(config)
        width = config.hidden_channels
        self.embedding = nn.Embedding(self.num_symbols + 1, width)  # the last is for what fills up
        self.encoder, self.decoder = (DilatedStack(config.max_length, width, config.dilations) for _ in range(2))
        self.to_code = nn.Linear(self.span_length * width, config.code_dim)
        self.quantizer = build_quantizer(config, channel_axis=-1)
        self.from_code = nn.Linear(config.code_dim, self.span_length * width)
        self.head = nn.Linear(width, self.num_symbols)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves; loading leaves what is not saved for us to set."""
        reset_code_usage(module)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Levels and spans."""
        return (self.config.codes_per_vector, self.num_spans)

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """All spans read from one codebook at each level."""
        return (self.num_spans,) * self.config.codes_per_vector

    @property
    def supports_prefix_decoding(self) -> bool:
        """They do where all codes of a span add up."""
        return self.config.codes_per_vector > 1

    def codebook_vectors(self) -> list[Tensor]:
        """The codebook of each level, `k d`."""
        return self.quantizer.codebooks()

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> codes `b (n s)`."""
        with eval_mode(self):
            codes = self.quantizer(self._latents(symbols)).codes
        return self._in_sequence(codes, self.valid_spans(symbols))

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Codes `b (n s)`, of which some are `mask`, -> symbols `b t`."""
        by_span, known = (rearrange(each, "b (n s) -> b s n", s=self.num_spans) for each in (codes, mask))
        with torch.autocast(codes.device.type, enabled=False):
            return self._logits(self._look_up(by_span, known)).argmax(dim=2)

    def forward(self, symbols: Tensor) -> TokenizerOutput:
        """Symbols `b t` -> loss, reconstruction (symbols `b t`), codes and metrics."""
        latents = self._latents(symbols)
        live = self.valid_spans(symbols)
        if isinstance(self.quantizer, ResidualQuantizer):
            coded = self.quantizer(latents, live, self._known(len(live)))
        else:
            coded = self.quantizer(latents, live)
        logits = self._logits(torch.where(live[..., None], coded.quantized, self._after_the_end()))
        target = symbols.where(self.valid_mask(symbols), IGNORE_INDEX)
        error = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE_INDEX)
        reconstruction = logits.detach().argmax(dim=2)
        metrics = {
            "byte_accuracy": (reconstruction == target).sum() / (target != IGNORE_INDEX).sum(),
            "nats_per_byte": error.detach(),
            **(self.quantizer.metrics() if self.training else {}),
        }
        return TokenizerOutput(error + coded.loss, reconstruction, self._in_sequence(coded.codes, live), metrics)

    @property
    def num_init_examples(self) -> int:
        """As many as have enough spans for k-means."""
        return max(1, MAX_INIT_VECTORS // self.num_spans)

    @torch.no_grad()
    def init_from_data(self, symbols: Tensor) -> None:
        """Put the codebooks on the latents of `b t`."""
        with eval_mode(self):
            shown = symbols[: self.num_init_examples]
            self.quantizer.init_from_data(self._latents(shown)[self.valid_spans(shown)])

    def _latents(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> a vector for each span, `b s d`."""
        self.check_symbols(symbols)
        hidden = self.encoder(self.embedding(symbols.where(self.valid_mask(symbols), self.num_symbols)))
        return self.to_code(rearrange(hidden, "b (s t) c -> b s (t c)", s=self.num_spans))

    def _logits(self, vectors: Tensor) -> Tensor:
        """Vectors of spans `b s d` -> logits `b t v`."""
        return self.head(self.decoder(rearrange(self.from_code(vectors), "b s (t c) -> b (s t) c", t=self.span_length)))

    def _look_up(self, codes: Tensor, known: Tensor) -> Tensor:
        """Codes `b s n` in range, of which some are `known`, -> vectors `b s d`."""
        with skip_validation():
            if isinstance(self.quantizer, ResidualQuantizer):
                return self.quantizer.lookup(codes, known)
            return self.quantizer.lookup(codes.squeeze(2)) * known

    def _after_the_end(self) -> Tensor:
        """The vector `d` of a span whose codes are 0, as those past the end of a text are."""
        codes = torch.zeros(1, 1, self.config.codes_per_vector, dtype=torch.long, device=self.device)
        return self._look_up(codes, codes == 0).detach().view(-1)

    def _known(self, num_texts: int) -> Tensor | None:
        """Which codes the decoder is shown in training, `b s n`: the first levels of each text, as many as chance has it; None: all."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        last = torch.randint(self.config.codes_per_vector, (num_texts, 1, 1), device=self.device)
        levels = torch.arange(self.config.codes_per_vector, device=self.device)
        return (levels <= last).expand(-1, self.num_spans, -1)

    def _in_sequence(self, codes: Tensor, live: Tensor) -> Tensor:
        """Codes `b s n`, or `b s`, -> `b (n s)`, 0 where spans are not `live`, `b s`."""
        by_span = codes.unflatten(-1, (self.num_spans, 1)) if codes.ndim == 2 else codes
        return rearrange(torch.where(live[..., None], by_span, 0), "b s n -> b (n s)")
