"""VQ-DRAW for pictures: squared error, a convolutional refiner, codes from coarse to fine."""

import torch
from torch import Tensor, nn

from .base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput, check_image_size
from .normalization import PixelNormalization
from .refiners import ConvRefiner, SegmentedRefiner
from .vqdraw import VQDraw, squared_error


class VQDrawImageConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawForImages`; a picture takes `num_stages` codes of `codebook_size` options each.

    Attributes:
        image_size: height and width of the pictures, pixels; a multiple of 4.
        hidden_channels, feature_channels, num_residual_blocks: size of the refiner, see `ConvRefiner`.
        segment_length: stages that share a refiner; 0: all of them.
        aux_coeff, final_coeff, grad_decay, checkpoint_stages: see `VQDraw`.
        pixel_mean, pixel_std: what pixels in [0, 1] are normalised with, inside.
    """

    model_type = "tok2img_vqdraw_image"

    image_size: int = 32
    num_channels: int = 3
    num_stages: int = 20
    codebook_size: int = 64
    hidden_channels: int = 128
    feature_channels: int = 64
    num_residual_blocks: int = 2
    segment_length: int = 0
    aux_coeff: float = 0.01
    final_coeff: float = 0.0
    grad_decay: float = 0.0
    checkpoint_stages: bool = False
    pixel_mean: float = 0.5
    pixel_std: float = 0.25

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_image_size(self.image_size, 4)
        if self.segment_length and self.num_stages % self.segment_length:
            raise ValueError(f"num_stages {self.num_stages} is no multiple of segment_length {self.segment_length}")


class VQDrawForImages(DiscreteTokenizer):
    """Codes that sharpen a picture one by one; any prefix of them decodes."""

    config_class = VQDrawImageConfig
    config: VQDrawImageConfig

    def __init__(self, config: VQDrawImageConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        self.draw = VQDraw(
            build_refiner(config),
            squared_error,
            state_shape=(config.num_channels, config.image_size, config.image_size),
            num_stages=config.num_stages,
            codebook_size=config.codebook_size,
            aux_coeff=config.aux_coeff,
            final_coeff=config.final_coeff,
            grad_decay=config.grad_decay,
            checkpoint_stages=config.checkpoint_stages,
            num_biased_stages=config.num_stages,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves."""

    @property
    def code_shape(self) -> tuple[int, ...]:
        """One code a stage."""
        return (self.config.num_stages,)

    @property
    def codebook_size(self) -> int:
        """Options at each stage."""
        return self.config.codebook_size

    @property
    def positions_share_codes(self) -> bool:
        """Code 5 of stage 0 has nothing to do with code 5 of stage 3."""
        return False

    def start_from_data(self, pixel_values: Tensor) -> None:
        """Start as a residual quantizer of `b c h w`; see `VQDraw.start_from_data`."""
        self.draw.start_from_data(self.normalize(pixel_values))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, the best step at every stage."""
        target = self.normalize(pixel_values, finite=True)
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.draw(target).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n`, or the first few of each picture's, -> `b c h w` in [0, 1]."""
        self.check_codes(codes, prefix=True)
        with torch.autocast(codes.device.type, enabled=False):
            return self.normalize.inverse(self.draw.decode(codes.long()))

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, reconstruction, codes and metrics."""
        target = self.normalize(pixel_values)
        drawing = self.draw(target)
        mse = self.normalize.squared_error(drawing.state, target)
        return TokenizerOutput(
            loss=self.draw.loss(drawing),
            reconstruction=self.normalize.inverse(drawing.state),
            codes=drawing.codes,
            metrics={"mse": mse, "first_stage_usage": share_in_use(drawing.codes[:, 0], self.codebook_size)},
        )


def build_refiner(config: VQDrawImageConfig) -> nn.Module:
    """One refiner for all stages, or one a segment."""
    length = config.segment_length or config.num_stages
    refiners: list[nn.Module] = [
        ConvRefiner(
            num_stages=length,
            codebook_size=config.codebook_size,
            num_channels=config.num_channels,
            hidden_channels=config.hidden_channels,
            feature_channels=config.feature_channels,
            num_residual_blocks=config.num_residual_blocks,
        )
        for _ in range(config.num_stages // length)
    ]
    return refiners[0] if len(refiners) == 1 else SegmentedRefiner(refiners, length)


def share_in_use(codes: Tensor, codebook_size: int) -> Tensor:
    """How many of the options this batch `b` chose at least once, as a share of those it could have."""
    chosen = torch.zeros(codebook_size, device=codes.device).index_fill_(0, codes, 1)
    return chosen.sum() / min(codebook_size, len(codes))
