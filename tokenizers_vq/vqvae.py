"""VQ-VAE: an autoencoder whose latent grid is made of codebook entries (van den Oord et al. 2017)."""

from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput, check_choice, check_image_size
from .convolution import ResidualBlock, downsampling, group_norm, upsampling
from .normalization import PixelNormalization
from .quantizer import VectorQuantizer
from .reconstruction import PIXEL_LOSSES, ReconstructionLoss


class VQVAEConfig(DiscreteTokenizerConfig):
    """Settings of a `VQVAE`.

    Attributes:
        image_size: height and width of the pictures, pixels; a multiple of `2 ** num_downsamples`.
        num_encoder_blocks, num_decoder_blocks: residual blocks on the latent grid. A code of an encoder without blocks depends on the
            pixels near it alone, which makes a simpler language for a prior: it need not guess how far away things change a code.
        num_downsamples: how often the grid is halved: 2 gives one code for 4x4 pixels.
        hidden_channels: width of the networks at the latent grid; half of it at every finer grid.
        code_dim: length of a codebook vector.
        commitment: beta of equation 3. decay: of the codebook's moving average. ema: move the codebook by that average, not by a loss.
        reconstruction: "squared" or "l1": error of normalised pixels that training lowers, where `forward` is given no other.
        pixel_mean, pixel_std: what pixels in [0, 1] are normalised with, inside.
    """

    model_type = "tok2img_vqvae"

    image_size: int = 32
    num_channels: int = 3
    num_downsamples: int = 2
    hidden_channels: int = 128
    num_encoder_blocks: int = 0
    num_decoder_blocks: int = 2
    codebook_size: int = 512
    code_dim: int = 64
    commitment: float = 0.25
    decay: float = 0.99
    ema: bool = True
    reconstruction: str = "squared"
    pixel_mean: float = 0.5
    pixel_std: float = 0.25

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_image_size(self.image_size, 2**self.num_downsamples)
        check_choice("reconstruction", self.reconstruction, PIXEL_LOSSES)

    def widths(self) -> list[int]:
        """Channels at each grid from the finest to the latent one."""
        return [
            max(min(16, self.hidden_channels), self.hidden_channels >> level)
            for level in reversed(range(self.num_downsamples))
        ]


class VQVAE(DiscreteTokenizer):
    """One level of codes on a grid. `forward` gives the loss: an error of normalised pixels plus the codebook's."""

    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        widths, width = config.widths(), config.hidden_channels
        self.encoder = nn.Sequential(
            downsampling(config.num_channels, widths), *residual_stack(width, config.num_encoder_blocks), nn.ReLU()
        )
        self.to_code = nn.Conv2d(width, config.code_dim, 1)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.code_dim,
            commitment=config.commitment,
            decay=config.decay,
            ema=config.ema,
            channel_axis=1,
        )
        self.from_code = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.decoder = nn.Sequential(
            *residual_stack(width, config.num_decoder_blocks),
            group_norm(width),
            upsampling(widths[::-1], config.num_channels),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation of convolutions stands; loading leaves what is not saved for us to set."""
        if isinstance(module, VectorQuantizer):
            module.skipped.zero_()

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Rows and columns of the latent grid."""
        side = self.config.image_size >> self.config.num_downsamples
        return side, side

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return self.config.codebook_size

    @property
    def code_groups(self) -> tuple[int, ...]:
        """All cells read from one codebook."""
        return (self.num_codes,)

    def codebook_vectors(self) -> list[Tensor]:
        """The codebook, `k d`."""
        return [self.quantizer.codebook.detach()]

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, row by row."""
        target = self.normalize(pixel_values, finite=True)
        with torch.autocast(pixel_values.device.type, enabled=False), evaluating(self.quantizer):
            return rearrange(self.quantizer(self._latents(target)).codes, "b h w -> b (h w)")

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> `b c h w` in [0, 1]."""
        self.check_codes(codes)
        grid = rearrange(codes.long(), "b (h w) -> b h w", h=self.code_shape[0])
        with torch.autocast(codes.device.type, enabled=False):
            return self.normalize.inverse(self._reconstruct(self.quantizer.lookup(grid)))

    def forward(self, pixel_values: Tensor, reconstruction_loss: ReconstructionLoss | None = None) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, reconstruction, codes and metrics; of another reconstruction loss than the config's, if given."""
        target = self.normalize(pixel_values)
        quantized = self.quantizer(self._latents(target))
        normalized = self._reconstruct(quantized.quantized)
        measure = PIXEL_LOSSES[self.config.reconstruction] if reconstruction_loss is None else reconstruction_loss
        return TokenizerOutput(
            loss=measure(normalized, target) + quantized.loss,
            reconstruction=self.normalize.inverse(normalized),
            codes=rearrange(quantized.codes, "b h w -> b (h w)"),
            metrics={"mse": self.normalize.squared_error(normalized, target), **self.quantizer.metrics()},
        )

    def _latents(self, normalized: Tensor) -> Tensor:
        return self.to_code(self.encoder(normalized))

    def _reconstruct(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.from_code(quantized))


def residual_stack(width: int, num_blocks: int) -> list[nn.Module]:
    """Residual blocks on the latent grid."""
    return [ResidualBlock(width, width // 2) for _ in range(num_blocks)]


class evaluating:  # noqa: N801 - reads as the statement it is
    """Hold a module in eval mode for the length of a `with` block."""

    def __init__(self, module: nn.Module):
        self.module, self.training = module, module.training

    def __enter__(self) -> Self:
        self.module.eval()
        return self

    def __exit__(self, *error: object) -> None:
        self.module.train(self.training)
