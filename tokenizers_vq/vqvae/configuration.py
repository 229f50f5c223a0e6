"""Settings of a VQ-VAE, and the quantizer that they describe."""

from ..losses.reconstruction import PIXEL_LOSSES
from ..quantization.configuration import QuantizerConfig
from ..validation import check_choice, check_image_size


class VQVAEConfig(QuantizerConfig):
    """Settings of a `VQVAE`; those of its quantizer: see `QuantizerConfig`.

    Attributes:
        image_size: height and width of the images, pixels; a multiple of `stride`. Others that are can be coded too.
        num_encoder_blocks, num_decoder_blocks: residual blocks on the latent grid. A code of an encoder without blocks depends on the
            pixels near it alone, which makes a simpler language for a prior: it need not guess how far away things change a code.
        num_downsamples: how often the grid is halved: 2 gives one code for 4x4 pixels.
        num_grids: 2 or more for a VQ-VAE-2, whose further grids are each half as fine as the one before.
        hidden_channels: width of the networks at the latent grids; half of it at every finer grid.
        reconstruction_loss: "mse" or "l1": error of normalised pixels that training lowers, where `forward` is given no other.
        search_steps: of the search for codes when a data set is tokenized, see `VQVAE.encode`.
        pixel_mean, pixel_std: what pixels in [0, 1] are normalised with, inside.
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
        """What height and width of an image must be multiples of."""
        return 2 ** (self.num_downsamples + self.num_grids - 1)

    def cells(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of each grid, coarse to fine, for images of a height and width; ValueError where the stride does not fit."""
        for side in image_size:
            check_image_size(side, self.stride)
        steps = [2 ** (self.num_downsamples + grid) for grid in reversed(range(self.num_grids))]
        return [(image_size[0] // step, image_size[1] // step) for step in steps]

    def widths(self) -> list[int]:
        """Channels at each grid from the finest to the latent one."""
        return [
            max(min(16, self.hidden_channels), self.hidden_channels >> level)
            for level in reversed(range(self.num_downsamples))
        ]
