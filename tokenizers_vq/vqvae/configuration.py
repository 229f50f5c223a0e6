"""Settings of a VQ-VAE for images."""

from ..losses.reconstruction import PIXEL_LOSSES
from ..quantization.configuration import QuantizerConfig
from ..validation import check_choice, check_image_size


class VQVAEConfig(QuantizerConfig):
    """Settings of a `VQVAE`. `QuantizerConfig` has those of its quantizer.

    Attributes:
        image_size: Height and width of the images in pixels, a multiple of `stride` (default 32).
            The model also codes images of other sizes that are multiples of it.
        num_channels: Channels of the images: 3 (default) for RGB, 1 for gray.
        num_downsamples: Times that the encoder halves the grid. The default 2 makes one code for
            4x4 pixels.
        num_grids: Grids of codes. 1 (default) is a VQ-VAE; 2 or more is a VQ-VAE-2, where each
            further grid has half the height and width.
        hidden_channels: Channels of the networks at the latent grid (default 128), halved at each
            finer resolution.
        num_encoder_blocks: Residual blocks of the encoder at each latent grid. With 0 (default) a
            code depends on the pixels near it alone. That makes a simpler language for a prior,
            which need not guess how distant pixels change a code.
        num_decoder_blocks: Residual blocks of the decoder at each latent grid (default 2).
        reconstruction_loss: Loss of the normalized pixels: "mse" (default) or "l1".
        search_steps: Gradient steps on the latents of each image when a data set is tokenized, see
            `VQVAE.encode`. 0 (default) = none.
        pixel_mean: Mean that is subtracted from pixels in [0, 1] (default 0.5).
        pixel_std: Standard deviation that they are divided by (default 0.25).

    Raises:
        ValueError: If a setting is unknown, has another type or is out of range.

    Example:
        >>> config = VQVAEConfig(image_size=64, num_downsamples=3)
        >>> config.stride, config.grid_shapes((64, 32))
        (8, [(8, 4)])
    """

    model_type = "tok2img_vqvae"
    zero_allowed = frozenset({"num_encoder_blocks", "num_decoder_blocks"})

    image_size: int = 32
    num_channels: int = 3
    num_downsamples: int = 2
    num_grids: int = 1
    hidden_channels: int = 128
    num_encoder_blocks: int = 0
    num_decoder_blocks: int = 2
    reconstruction_loss: str = "mse"
    search_steps: int = 0
    pixel_mean: float = 0.5
    pixel_std: float = 0.25

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_image_size(self.image_size, self.stride)
        check_choice("reconstruction_loss", self.reconstruction_loss, PIXEL_LOSSES)

    @property
    def stride(self) -> int:
        """Pixels per cell of the coarsest grid; image sizes are multiples of it."""
        return 2 ** (self.num_downsamples + self.num_grids - 1)

    def grid_shapes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the height and width of each grid, coarse to fine.

        Args:
            image_size: Height and width of the images in pixels.

        Raises:
            ValueError: If they are not multiples of `stride`.
        """
        for side in image_size:
            check_image_size(side, self.stride)
        strides = [2 ** (self.num_downsamples + grid) for grid in reversed(range(self.num_grids))]
        return [(image_size[0] // stride, image_size[1] // stride) for stride in strides]

    def block_out_channels(self) -> list[int]:
        """Return the channels at each resolution, from the finest to the latent grid."""
        return [
            max(min(16, self.hidden_channels), self.hidden_channels >> level)
            for level in reversed(range(self.num_downsamples))
        ]
