"""VQ-VAE for text: the bytes of each span become a codebook entry, or a sum of a few.

Encoder and decoder are dilated convolutions over the whole text, in both directions. A code
therefore depends on the neighbors of its span.

    bytes -> encoder -> quant_proj -> quantizer -> post_quant_proj -> decoder -> head -> bytes
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
    """Settings of a `VQVAEForText`.

    `TextSpanConfig` has those of the spans, `QuantizerConfig` those of the quantizer.

    Attributes:
        hidden_channels: Channels of the encoder and of the decoder (default 192).
        dilations: Dilation of each block of the encoder, and of each block of the decoder. The
            default (1, 2, 4, 8, 16) sees 31 bytes to either side.
        quantizer: "residual" (default; `num_quantizers` codes a span), "vector" or "fsq".
        codebook_size: Entries of each codebook (default 64).

    Raises:
        ValueError: If a setting is unknown, has another type or is out of range.

    Example:
        >>> config = VQVAETextConfig(max_length=24, span_length=6, num_quantizers=3)
        >>> config.codes_per_vector, config.codebook_size
        (3, 64)
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
    """Learned position embeddings, then residual blocks with growing dilations: `b t c` -> `b t c`.

    Args:
        length: Number of positions `t`.
        num_channels: Channels `c`.
        dilations: Dilation of each block.
    """

    def __init__(self, length: int, num_channels: int, dilations: tuple[int, ...]):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, num_channels))
        self.blocks = nn.ModuleList(DilatedBlock(1, num_channels, dilation) for dilation in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks to `b t c`."""
        x = x + self.positions
        for block in self.blocks:
            x = block(x, 0)
        return x


class VQVAEForText(TextSpanTokenizer):
    """Text tokenizer with one code, or several that add up, for each span of bytes.

    With a residual quantizer any prefix of the codes decodes. In training each text is decoded from
    a random number of its codebooks (quantizer dropout, Zeghidour et al. 2021, section III.C).

    Args:
        config: Settings of the model.

    Example:
        >>> from tokenizers_vq import VQVAETextConfig
        >>> config = VQVAETextConfig(max_length=12, num_quantizers=3, hidden_channels=16)
        >>> model = VQVAEForText(config).eval()
        >>> codes = model.encode(["a red disc", "a cat"])
        >>> model.code_shape, codes.shape, len(model.decode(codes))
        ((3, 2), torch.Size([2, 6]), 2)
    """

    config_class = VQVAETextConfig
    config: VQVAETextConfig

    def __init__(self, config: VQVAETextConfig):
        super().__init__(config)
        width = config.hidden_channels
        # The last embedding is for padding, which is not the end of the text.
        self.embedding = nn.Embedding(self.num_symbols + 1, width)
        self.encoder, self.decoder = (DilatedStack(config.max_length, width, config.dilations) for _ in range(2))
        self.quant_proj = nn.Linear(self.span_length * width, config.code_dim)
        self.quantizer = build_quantizer(config, channel_axis=-1)
        self.post_quant_proj = nn.Linear(config.code_dim, self.span_length * width)
        self.head = nn.Linear(width, self.num_symbols)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Reset the counters, which are not saved. Weights keep the initialization of torch."""
        reset_code_usage(module)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a text's codes: `(codes_per_vector, num_spans)`."""
        return (self.config.codes_per_vector, self.num_spans)

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Number of spans that read from each codebook: all of them."""
        return (self.num_spans,) * self.config.codes_per_vector

    @property
    def supports_prefix_decoding(self) -> bool:
        """True if a span has several codes, which add up."""
        return self.config.codes_per_vector > 1

    def codebook_vectors(self) -> list[Tensor]:
        """Return the codebooks, `k d` each, coarse to fine."""
        return self.quantizer.codebooks()

    def encode_symbols(self, symbols: Tensor) -> Tensor:
        """Encode symbols `b t` to codes `b (n s)`."""
        with eval_mode(self):
            codes = self.quantizer(self._latents(symbols)).codes
        return self._flatten_codes(codes, self.valid_spans(symbols))

    def decode_with_mask(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Decode codes to the most likely symbols.

        Args:
            codes: `b (n s)`.
            mask: False for codes that are not known and add nothing, `b (n s)` bool.

        Returns:
            Symbols, `b t`.
        """
        by_span, code_mask = (rearrange(each, "b (n s) -> b s n", s=self.num_spans) for each in (codes, mask))
        with torch.autocast(codes.device.type, enabled=False):
            return self._logits(self._lookup(by_span, code_mask)).argmax(dim=2)

    def forward(self, symbols: Tensor) -> TokenizerOutput:
        """Reconstruct symbols `b t` and return the training loss.

        The loss is the cross entropy of the bytes in nats, plus that of the quantizer.

        Args:
            symbols: Bytes of the alphabet and padding, `b t`.

        Returns:
            The loss, the most likely symbols `b t`, codes `b (n s)` and metrics (`byte_accuracy`,
            `nats_per_byte`; in training `perplexity` and `code_usage`).
        """
        latents = self._latents(symbols)
        valid_spans = self.valid_spans(symbols)
        if isinstance(self.quantizer, ResidualQuantizer):
            coded = self.quantizer(latents, valid_spans, self._sample_code_mask(len(symbols)))
        else:
            coded = self.quantizer(latents, valid_spans)
        # Spans past the end have code 0 when they are decoded, so the decoder must see it in
        # training.
        logits = self._logits(torch.where(valid_spans[..., None], coded.quantized, self._padding_vector()))
        target = symbols.where(self.valid_mask(symbols), IGNORE_INDEX)
        error = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE_INDEX)
        reconstruction = logits.detach().argmax(dim=2)
        metrics = {
            "byte_accuracy": (reconstruction == target).sum() / (target != IGNORE_INDEX).sum(),
            "nats_per_byte": error.detach(),
            **(self.quantizer.metrics() if self.training else {}),
        }
        return TokenizerOutput(
            error + coded.loss, reconstruction, self._flatten_codes(coded.codes, valid_spans), metrics
        )

    @property
    def num_init_examples(self) -> int:
        """Number of texts with enough spans for k-means."""
        return max(1, MAX_INIT_VECTORS // self.num_spans)

    @torch.no_grad()
    def init_from_data(self, symbols: Tensor) -> None:
        """Initialize all codebooks by k-means on the latents of texts, coarse to fine.

        Args:
            symbols: Symbols of texts, `b t`; the first `num_init_examples` are used.
        """
        with eval_mode(self):
            symbols = symbols[: self.num_init_examples]
            self.quantizer.init_from_data(self._latents(symbols)[self.valid_spans(symbols)])

    def _latents(self, symbols: Tensor) -> Tensor:
        """Encode symbols `b t` to one latent for each span, `b s d`."""
        self.check_symbols(symbols)
        padded = symbols.where(self.valid_mask(symbols), self.num_symbols)
        return self.quant_proj(
            rearrange(self.encoder(self.embedding(padded)), "b (s t) c -> b s (t c)", s=self.num_spans)
        )

    def _logits(self, latents: Tensor) -> Tensor:
        """Decode quantized latents `b s d` to logits `b t v`."""
        hidden = rearrange(self.post_quant_proj(latents), "b s (t c) -> b (s t) c", t=self.span_length)
        return self.head(self.decoder(hidden))

    def _lookup(self, codes: Tensor, code_mask: Tensor) -> Tensor:
        """Look up the latents `b s d` of codes `b s n`; those outside the mask add nothing."""
        with skip_validation():
            if isinstance(self.quantizer, ResidualQuantizer):
                return self.quantizer.lookup(codes, code_mask)
            return self.quantizer.lookup(codes.squeeze(2)) * code_mask

    def _padding_vector(self) -> Tensor:
        """Return the vector `d` of a span past the end of its text, all of whose codes are 0."""
        codes = torch.zeros(1, 1, self.config.codes_per_vector, dtype=torch.long, device=self.device)
        return self._lookup(codes, codes == 0).detach().view(-1)

    def _sample_code_mask(self, num_texts: int) -> Tensor | None:
        """Sample the mask of quantizer dropout: a random number of first codebooks for each text.

        Args:
            num_texts: Number of texts `b`.

        Returns:
            True for codes that the decoder sees, `b s n`. None outside of training: all of them.
        """
        if not (self.training and torch.is_grad_enabled()):
            return None
        last = torch.randint(self.config.codes_per_vector, (num_texts, 1, 1), device=self.device)
        codebooks = torch.arange(self.config.codes_per_vector, device=self.device)
        return (codebooks <= last).expand(-1, self.num_spans, -1)

    def _flatten_codes(self, codes: Tensor, valid_spans: Tensor) -> Tensor:
        """Flatten codes `b s n`, or `b s`, to `b (n s)`, with 0 past the end of the text.

        Args:
            codes: `b s n`, or `b s` of a quantizer with one code per vector.
            valid_spans: True for spans that hold text or its end, `b s`.
        """
        by_span = codes.unflatten(-1, (self.num_spans, 1)) if codes.ndim == 2 else codes
        return rearrange(torch.where(valid_spans[..., None], by_span, 0), "b s n -> b (n s)")
