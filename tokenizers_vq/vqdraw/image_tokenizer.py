"""VQ-DRAW for images: coarse-to-fine codes."""

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
from .refiners import ConvRefiner, build_segments

STAGE_LOSSES = ("mse", "gaussian_nll", "bce")
REFINERS = ("conv", *PRESETS)
ENCODE_DTYPES = ("float32", "bfloat16")
# Centers of few images do not fit others. Measured on MNIST, 64 hidden channels, after 120 CPU seconds:
# test error 0.132 after initialization from 8,192 digits (356 steps), 0.124 from 60,000 (272 steps).
NUM_INIT_IMAGES = 2**16


class VQDrawImageConfig(DiscreteTokenizerConfig):
    """Settings of a `VQDrawForImages`. An image has `num_stages` codes below `codebook_size`.

    Attributes:
        image_size: Height and width of the images in pixels, a multiple of 4 (default 32).
        num_channels: Channels of the images: 3 (default) for RGB, 1 for gray.
        num_stages: Number of stages (default 20).
        codebook_size: Options at each stage (default 64).
        refiner: "conv" (default) for `ConvRefiner`, or one of the paper's networks, "mnist", "svhn",
            "cifar10" and "celeba", see `OriginalRefiner`.
        hidden_channels: Channels of the `ConvRefiner` on its quarter grid (default 128).
        feature_channels: Channels of its half grid and of its head's input (default 64).
        num_residual_blocks: Residual blocks on its quarter grid (default 2).
        segment_length: Stages that share a refiner; 0 (default) = all stages. Shorter segments cost
            memory only. Measured on MNIST, 64 hidden channels, 10 stages, after 300 steps: error
            0.119 with one refiner, 0.115 with two, 0.113 with five, 0.112 with ten.
        active_stages: Run this number of first stages only; 0 (default) = all.
        stage_loss: "mse" (default); "gaussian_nll", with a standard deviation for each pixel value;
            or "bce" for black and white pixels.
        num_biased_stages: First stages whose options have learned biases; 0 (default) = all.
        aux_coeff: Weight of the mean error over options, see `VQDraw` for this and the next six.
        num_aux_options: Random options that estimate that mean; 0 (default) = all options.
        final_coeff: Weight of the last stage's error (default 0).
        grad_decay: Fraction of the gradient removed between stages (default 0).
        epsilon: Probability of a random option in training (default 0).
        checkpoint_stages: Recompute stages in the backward pass to save memory (default false).
        replace_dead_options: Move options that are hardly chosen (default true).
        beam_size: Beam of `encode_with_search`, see `beam_search` (default 4).
        encode_dtype: "float32" (default), or "bfloat16" to run the refiner under autocast when
            encoding. That takes about half the time with bfloat16 instructions. Errors and decoding
            stay in float32. The codes differ, the images are as close.
        pixel_mean: Mean that is subtracted from pixels in [0, 1] (default 0.5).
        pixel_std: Standard deviation that they are divided by (default 0.25).

    Raises:
        ValueError: If a setting is unknown, has another type or is out of range.

    Example:
        >>> config = VQDrawImageConfig.preset("mnist", num_stages=5)
        >>> config.refiner, config.image_size, config.num_stages, config.codebook_size
        ('mnist', 28, 5, 64)
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
        expected = PRESETS.get(self.refiner, {}).get("num_channels", self.num_channels)
        if self.num_channels != expected:
            raise ValueError(f"Expected num_channels {expected} for refiner {self.refiner!r}, got {self.num_channels}.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the config of a model of the paper.

        Args:
            name: Its data set: "mnist" (60 bits), "svhn" (120), "cifar10" or "celeba" (600).
            overrides: Settings that differ from the paper's.
        """
        check_choice("preset", name, PRESETS)
        return cls(**{"refiner": name, "num_biased_stages": 1} | PRESETS[name] | overrides)


class VQDrawForImages(DiscreteTokenizer):
    """Image tokenizer with coarse-to-fine codes, one for each stage; any prefix decodes.

    Args:
        config: Settings of the model.

    Example:
        >>> import torch
        >>> config = VQDrawImageConfig(image_size=8, num_stages=3, codebook_size=4, hidden_channels=16)
        >>> model = VQDrawForImages(config)
        >>> images = torch.rand(5, 3, 8, 8)
        >>> model.init_from_data(images)
        >>> codes = model.encode(images, beam_size=2)
        >>> codes.shape, model.decode(codes[:, :1]).shape
        (torch.Size([5, 3]), torch.Size([5, 3, 8, 8]))
    """

    config_class = VQDrawImageConfig
    config: VQDrawImageConfig

    def __init__(self, config: VQDrawImageConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        self.stage_loss: MSELoss | GaussianNLLLoss | BCELoss = MSELoss()
        if config.stage_loss == "bce":
            self.stage_loss = BCELoss(config)
        elif config.stage_loss == "gaussian_nll":
            self.stage_loss = GaussianNLLLoss()
        num_channels = config.num_channels * self.stage_loss.channel_multiplier
        shape = num_channels, config.image_size, config.image_size
        refiner = build_image_refiner(config, num_channels)
        self.vqdraw = VQDraw.from_config(config, refiner, self.stage_loss, state_shape=shape)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Reset the counters, which are not saved. Modules initialize their own weights."""
        if isinstance(module, VQDraw):
            module.reset_usage()

    @classmethod
    def from_vq_draw_checkpoint(cls, path: str | Path, **overrides: Any) -> Self:
        """Load a checkpoint of the original code, for MNIST, SVHN, CIFAR-10 or CelebA.

        Args:
            path: Its state dict, safetensors or a `.pt` file. A `.pt` file is read without running any
                code that it may contain.
            overrides: Settings that cannot be read from the tensors, such as `stage_loss="bce"`.

        Returns:
            The model in eval mode.

        Raises:
            ValueError: If the file does not hold tensors, if they fit none of the four architectures,
                or if a value is not finite.
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
        """One code for each active stage."""
        return (self.vqdraw.num_stages,)

    @property
    def codebook_size(self) -> int:
        """Number of options at each stage, `k`."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """One for each stage: code 5 of stage 0 is unrelated to code 5 of stage 3."""
        return (1,) * self.num_codes

    @property
    def supports_prefix_decoding(self) -> bool:
        """True: the first codes decode to a coarse image."""
        return True

    @property
    def num_init_examples(self) -> int:
        """Number of images for k-means at every stage."""
        return NUM_INIT_IMAGES

    def init_from_data(self, pixel_values: Tensor) -> None:
        """Initialize as a residual quantizer of images `b c h w`, see `VQDraw.init_from_data`."""
        self.vqdraw.init_from_data(self.normalize(pixel_values, check_range=True))

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, *, beam_size: int = 1) -> Tensor:
        """Encode images.

        Args:
            pixel_values: Images `b c h w` in [0, 1].
            beam_size: Beam of the search. 1 (default) is greedy, as in `forward`. A larger one costs
                about this many times as much, and its codes decode to closer images.

        Returns:
            Codes, `b n`.
        """
        target = self.normalize(pixel_values, check_range=True)
        use_bfloat16 = self.config.encode_dtype == "bfloat16"
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=use_bfloat16):
            return beam_search(self.vqdraw, target, beam_size)

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """Encode images `b c h w` in [0, 1] to codes `b n` with the config's `beam_size`."""
        return self.encode(pixel_values, beam_size=self.config.beam_size)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `b n`, or any prefix of them, to images `b c h w` in [0, 1]."""
        self.check_codes(codes, prefix=True)
        with torch.autocast(codes.device.type, enabled=False):
            return self._to_pixels(self.vqdraw.decode(codes.long()))

    @torch.no_grad()
    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the images `b c h w` after each stage of the codes `b n`."""
        self.check_codes(codes, prefix=True)
        with torch.autocast(codes.device.type, enabled=False):
            for state in self.vqdraw.decode_progressively(codes.long()):
                yield self._to_pixels(state)

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Compute the training loss, reconstruction, codes and metrics of images `b c h w` in [0, 1].

        The metric `first_stage_usage` is the number of options that the batch chooses at stage 0,
        divided by the number that it could choose.
        """
        target = self.normalize(pixel_values)
        output = self.vqdraw(target)
        is_used = torch.zeros(self.codebook_size, device=target.device).index_fill_(0, output.codes[:, 0], 1)
        return TokenizerOutput(
            loss=self.vqdraw.loss(output),
            reconstruction=self._to_pixels(output.state),
            codes=output.codes,
            metrics={
                "mse": self.normalize.squared_error(self.stage_loss.reconstruct(output.state), target),
                "first_stage_usage": is_used.sum() / min(self.codebook_size, len(target)),
            },
        )

    def _to_pixels(self, state: Tensor) -> Tensor:
        """Convert states `b ...` to images `b c h w` in [0, 1]."""
        return self.normalize.inverse(self.stage_loss.reconstruct(state))


def build_image_refiner(config: VQDrawImageConfig, num_channels: int) -> nn.Module:
    """Build one refiner for all stages, or one for each segment.

    Args:
        config: Settings of the model.
        num_channels: Channels of a state.
    """
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
    return build_segments(build, config.num_stages, config.segment_length, active_stages=config.active_stages)
