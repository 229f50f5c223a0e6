"""VQ-DRAW for images: codes from coarse to fine."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from ..images.normalization import PixelNormalization
from ..loading import check_finite
from ..validation import check_choice, check_image_size, check_stages
from .beam_search import beam_search
from .core import VQDraw
from .losses import BCELoss, GaussianNLLLoss, MSELoss
from .original_checkpoints import convert_state_dict, infer_config, read_tensors
from .original_refiners import PRESETS, OriginalRefiner
from .refiners import ConvRefiner, in_segments

STAGE_LOSSES = ("mse", "gaussian_nll", "bce")
REFINERS = ("conv", *PRESETS)
ENCODE_DTYPES = ("float32", "bfloat16")
# Centres of few images are no centres of others: MNIST, 64 hidden channels, after 120 CPU seconds, an error of 0.132 on test digits where
# 8,192 digits made the start (356 steps), 0.124 where 60,000 did (272 steps, for that takes its time).
IMAGES_TO_START_FROM = 2**16


class VQDrawImageConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawForImages`; an image takes `num_stages` codes of `codebook_size` options each.

    Attributes:
        image_size: height and width of the images, pixels; a multiple of 4.
        refiner: "conv" is ours; "mnist", "svhn", "cifar10" and "celeba" are those published with the paper, see `OriginalRefiner`.
        hidden_channels, feature_channels, num_residual_blocks: size of our refiner, see `ConvRefiner`.
        segment_length: stages that share a refiner; 0: all of them. Fewer cost memory alone: MNIST, 64 hidden channels, after 300 steps
            an error of 0.119 where all ten share one, of 0.115 where five do, 0.113 where two do and 0.112 where none does.
        active_stages: go through the first so many stages only; 0: all.
        stage_loss: "mse"; "gaussian_nll", where a state has a deviation beside each mean; or "bce", for pixels that are black or white.
        num_biased_stages: stages with a learned bias for each option; 0: all.
        aux_coeff, num_aux_options, final_coeff, grad_decay, epsilon, checkpoint_stages, revive: see `VQDraw`.
        beam_size: of the search when a data set is tokenized, see `beam_search`.
        encode_dtype: "bfloat16" has the refiner compute in it when codes are searched, on hardware with instructions for it in about half
            the time; errors of steps, and decoding, are always in float32. Other codes, and images as near.
        pixel_mean, pixel_std: what pixels in [0, 1] are normalised with, inside.
    """

    model_type = "tok2img_vqdraw_image"

    image_size: int = 32
    num_channels: int = 3
    num_stages: int = 20
    codebook_size: int = 64
    refiner: str = "conv"
    hidden_channels: int = 128
    feature_channels: int = 64
    num_residual_blocks: int = 2
    segment_length: int = 0
    active_stages: int = 0
    stage_loss: str = "mse"
    num_biased_stages: int = 0
    aux_coeff: float = 0.01
    num_aux_options: int = 0
    final_coeff: float = 0.0
    grad_decay: float = 0.0
    epsilon: float = 0.0
    checkpoint_stages: bool = False
    replace_dead_options: bool = True
    beam_size: int = 4
    encode_dtype: str = "float32"
    pixel_mean: float = 0.5
    pixel_std: float = 0.25

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_image_size(self.image_size, 8 if self.refiner == "celeba" else 4)
        check_choice("refiner", self.refiner, REFINERS)
        check_choice("stage_loss", self.stage_loss, STAGE_LOSSES)
        check_choice("encode_dtype", self.encode_dtype, ENCODE_DTYPES)
        check_stages(
            self.num_stages,
            self.segment_length,
            active_stages=self.active_stages,
            num_biased_stages=self.num_biased_stages,
        )
        wanted = PRESETS.get(self.refiner, {}).get("num_channels", self.num_channels)
        if self.num_channels != wanted:
            raise ValueError(f"refiner {self.refiner!r} draws {wanted} channels, got {self.num_channels}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published model of a data set: "mnist" (60 bits), "svhn" (120), "cifar10" or "celeba" (600)."""
        check_choice("preset", name, PRESETS)
        return cls(**{"refiner": name, "num_biased_stages": 1} | PRESETS[name] | overrides)


class VQDrawForImages(DiscreteTokenizer):
    """Codes that sharpen an image one by one; any prefix of them decodes."""

    config_class = VQDrawImageConfig
    config: VQDrawImageConfig

    def __init__(self, config: VQDrawImageConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        self.stage_loss = build_stage_loss(config)
        num_channels = config.num_channels * self.stage_loss.state_channels
        shape = num_channels, config.image_size, config.image_size
        self.vqdraw = VQDraw.from_config(
            config, build_refiner(config, num_channels), self.stage_loss, state_shape=shape
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves; loading leaves what is not saved for us to set."""
        if isinstance(module, VQDraw):
            module.reset_usage()

    @classmethod
    def from_vq_draw_checkpoint(cls, path: str | Path, **overrides: Any) -> Self:
        """A model published with the paper, or trained by its code, for MNIST, SVHN, CIFAR-10 or CelebA.

        Args:
            path: its state dict, as safetensors or as a `.pt` file, which is read without running what else it may hold.
            overrides: settings that no tensor tells, such as `stage_loss="bce"` for one that was trained by its `BCELoss`.

        Raises:
            ValueError: for a file that holds no tensors, for tensors that none of the four architectures has, and for values that are
                not finite.
        """
        tensors = read_tensors(path)
        try:
            settings = infer_config(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        model = cls(VQDrawImageConfig.preset(settings.pop("refiner"), **settings | overrides))
        model.vqdraw.load_state_dict(convert_state_dict(tensors))
        check_finite(model, path)
        return model.eval()

    @property
    def code_shape(self) -> tuple[int, ...]:
        """One code an active stage."""
        return (self.vqdraw.num_stages,)

    @property
    def codebook_size(self) -> int:
        """Options at each stage."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """Code 5 of stage 0 has nothing to do with code 5 of stage 3."""
        return (1,) * self.num_codes

    @property
    def supports_prefix_decoding(self) -> bool:
        """They do: codes go from coarse to fine."""
        return True

    @property
    def num_init_examples(self) -> int:
        """Enough for k-means at every stage."""
        return IMAGES_TO_START_FROM

    def init_from_data(self, pixel_values: Tensor) -> None:
        """Start as a residual quantizer of `b c h w`; see `VQDraw.init_from_data`."""
        self.vqdraw.init_from_data(self.normalize(pixel_values, check_range=True))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, *, beam_size: int = 1) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`.

        Args:
            beam_size: 1 takes the best step at every stage, as `forward` does; more costs so many times as much and finds codes that
                decode to nearer images.
        """
        target = self.normalize(pixel_values, check_range=True)
        in_bfloat16 = self.config.encode_dtype == "bfloat16"
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=in_bfloat16):
            return beam_search(self.vqdraw, target, beam_size)

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, searched with the config's `beam_size`."""
        return self.encode(pixel_values, beam_size=self.config.beam_size)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n`, or the first few of each image's, -> `b c h w` in [0, 1]."""
        self.check_codes(codes, prefix=True)
        with torch.autocast(codes.device.type, enabled=False):
            return self._pixels(self.vqdraw.decode(codes.long()))

    @torch.no_grad()
    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """The image `b c h w` after each of the codes `b n`, one after another."""
        self.check_codes(codes, prefix=True)
        with torch.autocast(codes.device.type, enabled=False):
            for state in self.vqdraw.decode_progressively(codes.long()):
                yield self._pixels(state)

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, reconstruction, codes and metrics."""
        target = self.normalize(pixel_values)
        output = self.vqdraw(target)
        mse = self.normalize.squared_error(self.stage_loss.reconstruct(output.state), target)
        return TokenizerOutput(
            loss=self.vqdraw.loss(output),
            reconstruction=self._pixels(output.state),
            codes=output.codes,
            metrics={"mse": mse, "first_stage_usage": usage_fraction(output.codes[:, 0], self.codebook_size)},
        )

    def _pixels(self, state: Tensor) -> Tensor:
        """State `b ...` -> `b c h w` in [0, 1]."""
        return self.normalize.inverse(self.stage_loss.reconstruct(state))


def build_stage_loss(config: VQDrawImageConfig) -> MSELoss | GaussianNLLLoss | BCELoss:
    """What the config's `error` names."""
    if config.stage_loss == "bce":
        return BCELoss(config)
    return GaussianNLLLoss() if config.stage_loss == "gaussian_nll" else MSELoss()


def build_refiner(config: VQDrawImageConfig, num_channels: int) -> nn.Module:
    """One refiner for all stages, or one a segment."""
    if config.refiner in PRESETS:
        gaussian = config.stage_loss == "gaussian_nll"
        build = partial(OriginalRefiner, config.refiner, codebook_size=config.codebook_size, gaussian=gaussian)
    else:
        build = partial(
            ConvRefiner,
            codebook_size=config.codebook_size,
            num_channels=num_channels,
            hidden_channels=config.hidden_channels,
            feature_channels=config.feature_channels,
            num_residual_blocks=config.num_residual_blocks,
        )
    return in_segments(build, config.num_stages, config.segment_length, active_stages=config.active_stages)


def usage_fraction(codes: Tensor, codebook_size: int) -> Tensor:
    """How many of the options this batch `b` chose at least once, as a share of those it could have."""
    chosen = torch.zeros(codebook_size, device=codes.device).index_fill_(0, codes, 1)
    return chosen.sum() / min(codebook_size, len(codes))
