"""Wrap an image tokenizer of transformers or diffusers in the interface of `DiscreteTokenizer`."""

from dataclasses import field
from pathlib import Path
from typing import Any, Self, cast

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
from .adapters import ADAPTERS, VQModelAdapter, adapter_name, build, check_settings, default_settings, load_original

COMMITMENT_WEIGHT = 0.25  # beta of van den Oord et al. 2017, equation 3


class PretrainedImageTokenizerConfig(DiscreteTokenizerConfig):
    """Settings of a `PretrainedImageTokenizer`; `wrap` and `from_source` fill them in.

    Attributes:
        model_class: Class of the wrapped model, a key of `ADAPTERS`.
        model_settings: Settings that this class is built from; those left out get their defaults.
        image_size: Height and width of the images in pixels, a multiple of `stride`.
        pixel_mean: Subtracted from pixels in [0, 1].
        pixel_std: Divides the difference. The defaults normalize to [-1, 1], which all of these
            models expect.

    Raises:
        ValueError: For an unknown class or setting, and an `image_size` that `stride` does not
            divide.

    Example:
        >>> from tokenizers_vq import PretrainedImageTokenizerConfig
        >>> config = PretrainedImageTokenizerConfig(model_class="JanusVQVAE", image_size=384)
        >>> config.stride, config.codebook_size, config.num_channels
        (16, 16384, 3)
    """

    model_type = "tok2img_pretrained"

    model_class: str = ""
    model_settings: dict[str, Any] = field(default_factory=dict)
    image_size: int = 256
    pixel_mean: float = 0.5
    pixel_std: float = 0.5

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        self.model_settings = check_settings(self.model_class, self.model_settings)
        check_image_size(self.image_size, self.stride)

    @property
    def stride(self) -> int:
        """Height and width in pixels of the square that a code stands for."""
        # One grid per width, and a halving between neighboring grids.
        return 2 ** (len(self.model_settings[ADAPTERS[self.model_class].widths_field]) - 1)

    @property
    def num_channels(self) -> int:
        """Number of channels of the images."""
        return self.model_settings["in_channels"]

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries."""
        return self.model_settings[ADAPTERS[self.model_class].codebook_size_field]


class PretrainedImageTokenizer(DiscreteTokenizer):
    """Image tokenizer around a model of a class in `ADAPTERS`, with a grid of codes.

    The nearest-neighbor search is our own. It takes a few megabytes at a time, whereas the
    libraries' search holds the distance of every vector to every entry. The loss is our own too:
    the squared error of normalized pixels, plus |sg(z) - e|^2 + 0.25 |z - sg(e)|^2 between vectors
    and entries (van den Oord et al. 2017, equation 3).

    A ChameleonVQVAE can only encode; `decode` and `forward` raise a ValueError.

    Example:
        >>> import torch
        >>> from transformers import JanusVQVAE, JanusVQVAEConfig
        >>> from tokenizers_vq import PretrainedImageTokenizer
        >>> config = JanusVQVAEConfig(
        ...     embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
        ...     num_embeddings=16, num_patches=4, projection_dim=8, image_token_embed_dim=8)
        >>> tokenizer = PretrainedImageTokenizer.wrap(JanusVQVAE(config), image_size=8)
        >>> codes = tokenizer.encode(torch.rand(2, 3, 8, 8))
        >>> codes.shape, tokenizer.decode(codes).shape
        (torch.Size([2, 16]), torch.Size([2, 3, 8, 8]))
    """

    config_class = PretrainedImageTokenizerConfig
    config: PretrainedImageTokenizerConfig

    def __init__(self, config: PretrainedImageTokenizerConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config)
        self.model = build(config.model_class, config.model_settings)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the wrapped model initializes itself."""

    @classmethod
    def wrap(cls, model: nn.Module, *, image_size: int, pixel_mean: float = 0.5, pixel_std: float = 0.5) -> Self:
        """Wrap a model in place: it is converted to float32 and put into eval mode.

        Args:
            model: A model of one of the classes in `ADAPTERS`.
            image_size: Height and width of the images in pixels, a multiple of the stride.
            pixel_mean: Subtracted from pixels in [0, 1].
            pixel_std: Divides the difference.

        Raises:
            ValueError: For a model of another class, weights that are not finite, and an
                `image_size` that the stride does not divide.
        """
        name, source = adapter_name(model), cast("Any", model)
        config = PretrainedImageTokenizerConfig(
            model_class=name,
            model_settings={key: getattr(source.config, key) for key in default_settings(name)},
            image_size=image_size,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        check_finite(model, name)
        with torch.device("meta"):  # no memory for weights that are replaced in the next line
            tokenizer = cls(config)
        tokenizer.model = model.float()
        return tokenizer.eval()

    @classmethod
    def from_source(cls, name: str | Path, *, image_size: int, subfolder: str = "", **normalization: float) -> Self:
        """Load and wrap a model that transformers or diffusers saved.

        Of a whole Janus, Emu3 or Chameleon model, its image tokenizer is loaded.

        Args:
            name: Folder, or name of a hub repository.
            image_size: Height and width of the images in pixels, a multiple of the stride.
            subfolder: Folder inside it that holds the model.
            normalization: `pixel_mean` and `pixel_std`, see `wrap`.

        Raises:
            ValueError: As `wrap`, and for a folder without a complete model of such a class.
        """
        return cls.wrap(load_original(name, subfolder=subfolder), image_size=image_size, **normalization)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Rows and columns of the grid of codes."""
        side = self.config.image_size // self.config.stride
        return side, side

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """One codebook for all codes."""
        return (self.num_codes,)

    @property
    def adapter(self) -> VQModelAdapter:
        """Adapter of the wrapped model's class."""
        return ADAPTERS[self.config.model_class]

    def codebook_vectors(self) -> list[Tensor]:
        """Return the codebook `k d` as the only element."""
        return [self.adapter.codebook(self.model).detach()]

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode images `b c h w` in [0, 1] into codes `b n`, row by row of the grid."""
        target = self.normalize(pixel_values, check_range=True)
        if not len(target):
            return torch.empty(0, self.num_codes, dtype=torch.long, device=target.device)
        with torch.autocast(target.device.type, enabled=False), eval_mode(self.model):
            return self._nearest(self.adapter.encode(self.model, target), self.adapter.codebook(self.model))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `b n` into images `b c h w` in [0, 1]."""
        self.check_codes(codes)
        if not len(codes):
            return torch.empty(
                0, self.config.num_channels, self.config.image_size, self.config.image_size, device=codes.device
            )
        with torch.autocast(codes.device.type, enabled=False), eval_mode(self.model):
            entries = self._lookup(codes.long(), self.adapter.codebook(self.model))
            return self.normalize.inverse(self.adapter.decode(self.model, entries))

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Compute loss, reconstruction, codes and metrics of images `b c h w` in [0, 1]."""
        target = self.normalize(pixel_values)
        vectors, codebook = self.adapter.encode(self.model, target).float(), self.adapter.codebook(self.model)
        codes = self._nearest(vectors, codebook)
        entries = self._lookup(codes, codebook)
        normalized = self.adapter.decode(self.model, straight_through(vectors, entries))
        commitment_loss, codebook_loss = F.mse_loss(vectors, entries.detach()), F.mse_loss(entries, vectors.detach())
        return TokenizerOutput(
            loss=F.mse_loss(normalized.float(), target) + codebook_loss + COMMITMENT_WEIGHT * commitment_loss,
            reconstruction=self.normalize.inverse(normalized),
            codes=codes,
            metrics={
                "mse": self.normalize.squared_error(normalized, target),
                "perplexity": perplexity(torch.bincount(codes.flatten(), minlength=self.codebook_size)),
            },
        )

    def _nearest(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Return the codes `b n` of vectors `b d h w`: the nearest of the entries `k d`."""
        flat = rearrange(vectors.detach(), "b d h w -> (b h w) d")
        return rearrange(nearest_codes(flat, codebook.detach()), "(b n) -> b n", n=self.num_codes)

    def _lookup(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Look up codes `b n` among the entries `k d`; returns `b d h w`."""
        return rearrange(F.embedding(codes, codebook), "b (h w) d -> b d h w", h=self.code_shape[0])
