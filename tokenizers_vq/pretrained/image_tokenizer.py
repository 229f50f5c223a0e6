"""An image tokenizer of transformers or diffusers as one of ours: its codes serve wherever those of a `VQVAE` do."""

from dataclasses import field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..base import DiscreteTokenizer, DiscreteTokenizerConfig, TokenizerOutput
from ..images.normalization import PixelNormalization
from ..loading import check_finite
from ..modules.eval_mode import eval_mode
from ..quantization.code_usage import perplexity
from ..quantization.gradient_estimators import straight_through
from ..quantization.nearest_neighbors import nearest_codes
from ..validation import check_image_size
from .adapters import FAMILIES, Family, adapter_name, build, check_settings, load_original, settings_of

COMMITMENT = 0.25


class PretrainedImageTokenizerConfig(DiscreteTokenizerConfig):
    """Settings of a `PretrainedImageTokenizer`; `wrap` and `from_source` fill them in.

    Attributes:
        family: class of the model inside, one of `FAMILIES`.
        model_settings: what that class is built from.
        image_size: height and width of the images, pixels; a multiple of the pixels that a code stands for.
        pixel_mean, pixel_std: what pixels in [0, 1] are normalised with, inside: to [-1, 1], as all of these models want them.
    """

    model_type = "tok2img_pretrained"

    family: str = ""
    model_settings: dict[str, Any] = field(default_factory=dict)
    image_size: int = 256
    pixel_mean: float = 0.5
    pixel_std: float = 0.5

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        self.model_settings = check_settings(self.family, self.model_settings)
        check_image_size(self.image_size, self.stride)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that a code stands for."""
        return 2 ** (len(self.model_settings[FAMILIES[self.family].levels]) - 1)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.model_settings["in_channels"]

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return self.model_settings[FAMILIES[self.family].codebook_size]


class PretrainedImageTokenizer(DiscreteTokenizer):
    """A model of one of `FAMILIES`, which makes and draws a grid of codes.

    The search for the nearest entries is ours: a few megabytes at a time, where theirs holds the distance of every vector to every entry.
    So is the loss: squared error in normalised pixels, plus |sg(z) - e|^2 + 0.25 |z - sg(e)|^2 between vectors and entries (van den Oord et
    al. 2017, equation 3). A ChameleonVQVAE encodes only: what needs its images is a ValueError.
    """

    config_class = PretrainedImageTokenizerConfig
    config: PretrainedImageTokenizerConfig

    def __init__(self, config: PretrainedImageTokenizerConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        self.model = build(config.family, config.model_settings)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The model inside initialises itself."""

    @classmethod
    def wrap(cls, model: nn.Module, *, image_size: int, pixel_mean: float = 0.5, pixel_std: float = 0.5) -> Self:
        """Take over a live model, in place: it becomes float32 and goes into eval mode.

        Raises:
            ValueError: for a model of a class that is none of `FAMILIES`, for weights that are not finite, and for an `image_size` that
                is not a multiple of the pixels that a code stands for.
        """
        config = PretrainedImageTokenizerConfig(
            family=adapter_name(model),
            model_settings=settings_of(model),
            image_size=image_size,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        check_finite(model, config.family)
        with torch.device("meta"):
            tokenizer = cls(config)
        tokenizer.model = model.float()
        return tokenizer.eval()

    @classmethod
    def from_source(cls, name: str | Path, *, image_size: int, subfolder: str = "", **normalization: float) -> Self:
        """Wrap what transformers or diffusers saved under a folder or hub name: the model, or a whole Janus, Emu3 or Chameleon around it.

        Args:
            normalization: `pixel_mean` and `pixel_std`, see `wrap`.

        Raises:
            ValueError: as `wrap` does, and for a folder that does not hold such a model whole.
        """
        return cls.wrap(load_original(name, subfolder=subfolder), image_size=image_size, **normalization)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Rows and columns of the latent grid."""
        side = self.config.image_size // self.config.stride
        return side, side

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """All cells read from one codebook."""
        return (self.num_codes,)

    @property
    def family(self) -> Family:
        """How the model inside gets vectors from pixels and pixels from vectors."""
        return FAMILIES[self.config.family]

    def codebook_vectors(self) -> list[Tensor]:
        """The codebook, `k d`."""
        return [self.family.codebook(self.model).detach()]

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, row by row."""
        target = self.normalize(pixel_values, check_range=True)
        if not len(target):
            return torch.empty(0, self.num_codes, dtype=torch.long, device=target.device)
        with torch.autocast(target.device.type, enabled=False), eval_mode(self.model):
            return self._nearest(self.family.latents(self.model, target), self.family.codebook(self.model))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> `b c h w` in [0, 1]."""
        self.check_codes(codes)
        if not len(codes):
            return torch.empty(
                0, self.config.num_channels, self.config.image_size, self.config.image_size, device=codes.device
            )
        with torch.autocast(codes.device.type, enabled=False), eval_mode(self.model):
            entries = self._lookup(codes.long(), self.family.codebook(self.model))
            return self.normalize.inverse(self.family.draw(self.model, entries))

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, reconstruction, codes and metrics."""
        target = self.normalize(pixel_values)
        vectors, codebook = self.family.latents(self.model, target).float(), self.family.codebook(self.model)
        codes = self._nearest(vectors, codebook)
        entries = self._lookup(codes, codebook)
        normalized = self.family.draw(self.model, straight_through(vectors, entries))
        towards_entries, towards_vectors = F.mse_loss(vectors, entries.detach()), F.mse_loss(entries, vectors.detach())
        return TokenizerOutput(
            loss=F.mse_loss(normalized.float(), target) + towards_vectors + COMMITMENT * towards_entries,
            reconstruction=self.normalize.inverse(normalized),
            codes=codes,
            metrics={
                "mse": self.normalize.squared_error(normalized, target),
                "perplexity": perplexity(torch.bincount(codes.flatten(), minlength=self.codebook_size)),
            },
        )

    def _nearest(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Vectors `b d h w` and entries `k d` -> codes `b n`."""
        flat = rearrange(vectors.detach(), "b d h w -> (b h w) d")
        return rearrange(nearest_codes(flat, codebook.detach()), "(b n) -> b n", n=self.num_codes)

    def _lookup(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Codes `b n` and entries `k d` -> `b d h w`."""
        return rearrange(F.embedding(codes, codebook), "b (h w) d -> b d h w", h=self.code_shape[0])
