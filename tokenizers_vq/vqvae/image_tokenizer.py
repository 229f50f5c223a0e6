"""VQ-VAE: an autoencoder whose latent grid is made of codebook entries (van den Oord et al. 2017), or of another quantizer's values.

With several grids it is a VQ-VAE-2 (Razavi et al. 2019): each coarser grid is half as fine, is coded first, and conditions those after.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..base import DiscreteTokenizer, TokenizerOutput
from ..images.normalization import PixelNormalization
from ..losses.reconstruction import PIXEL_LOSSES, ReconstructionLoss
from ..modules.batch_invariant import batch_invariant_conv1x1, batch_invariant_encode
from ..modules.conv import ResidualBlock, channels_last, downsampling, group_norm, upsampling
from ..modules.eval_mode import eval_mode
from ..quantization.code_usage import reset_code_usage
from ..quantization.configuration import Quantizer, build_quantizer
from ..quantization.kmeans import MAX_INIT_VECTORS
from ..quantization.residual_quantizer import ResidualQuantizer
from ..validation import skip_validation
from .configuration import VQVAEConfig
from .latent_optimization import QuantizedImages, search

SEARCHED_PIXELS, SEARCHED_PIXELS_ON_GPU = 2**15, 2**20  # those of images whose decoding is kept for the way back


class TopGrid(nn.Module):
    """A grid half as fine, coded before the finer ones (Razavi et al. 2019, section 3.1)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        width = config.hidden_channels
        self.down = nn.Sequential(
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            *residual_stack(width, config.num_encoder_blocks),
            nn.ReLU(),
        )
        self.to_code = nn.Conv2d(width, config.code_dim, 1)
        self.quantizer = build_quantizer(config)
        self.from_code = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.decoder = nn.Sequential(
            *residual_stack(width, config.num_decoder_blocks), group_norm(width), upsampling([width], width)
        )


class VQVAE(DiscreteTokenizer):
    """Codes on grids: one a cell, or several that add up. `forward` gives an error of normalised pixels plus the codebooks' loss.

    It codes images of every size that its stride divides; `num_codes` and `code_shape` are those of `config.image_size`.
    """

    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.normalize = PixelNormalization(config, stride=config.stride)
        widths, width = config.widths(), config.hidden_channels
        self.encoder = nn.Sequential(
            downsampling(config.num_channels, widths), *residual_stack(width, config.num_encoder_blocks), nn.ReLU()
        )
        self.to_code = nn.Conv2d(width, config.code_dim, 1)
        self.quantizer = build_quantizer(config)
        self.from_code = nn.Conv2d(config.code_dim, width, 3, padding=1)
        self.decoder = nn.Sequential(
            *residual_stack(width, config.num_decoder_blocks),
            group_norm(width),
            upsampling(widths[::-1], config.num_channels),
        )
        self.coarser = nn.ModuleList(TopGrid(config) for _ in range(config.num_grids - 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation of convolutions stands; loading leaves what is not saved for us to set."""
        reset_code_usage(module)

    @property
    def num_quantizers(self) -> int:
        """Codes of a cell."""
        return self.config.codes_per_vector

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Rows and columns of the grid, after the levels where a cell has several codes; codes of several grids are one row."""
        groups = self.positions_per_codebook
        if self.config.num_grids > 1:
            return (sum(groups),)
        (grid,) = self.cells()
        return grid if len(groups) == 1 else (len(groups), *grid)

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return self.config.codebook_size

    @property
    def positions_per_codebook(self) -> tuple[int, ...]:
        """All cells of a grid, and of a level of it, read from one codebook."""
        return tuple(rows * columns for rows, columns in self.cells() for _ in range(self.num_quantizers))

    @property
    def supports_prefix_decoding(self) -> bool:
        """They do where all codes of a cell add up."""
        return self.num_quantizers > 1 and self.config.num_grids == 1

    def cells(self, image_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Rows and columns of each grid, coarse to fine; ValueError for a size that the stride does not divide."""
        return self.config.cells(image_size or (self.config.image_size, self.config.image_size))

    def grids(self) -> list[Any]:
        """The modules that hold a grid's `to_code`, `quantizer`, `from_code` and `decoder`, coarse to fine; this one is the finest."""
        return [*reversed(self.coarser), self]

    def codebook_vectors(self) -> list[Tensor]:
        """The codebook of each group of codes, `k d`."""
        return [vectors for grid in self.grids() for vectors in grid.quantizer.codebooks()]

    @property
    def num_init_examples(self) -> int:
        """As many as have enough cells for k-means."""
        return max(1, MAX_INIT_VECTORS // math.prod(self.cells()[-1]))

    @torch.no_grad()
    def init_from_data(self, pixel_values: Tensor) -> None:
        """Put the codebooks on latents of the images `b c h w`; those of finer grids on what is left when coarser ones are coded."""
        shown = pixel_values[: self.num_init_examples]
        with eval_mode(self):
            self._code(self._features(self.normalize(shown)), starting=True, reconstruct=False)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, *, search_steps: int = 0) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, row by row; the coarsest grid first, and of a grid the coarsest level.

        Args:
            search_steps: 0 takes the entries nearest to the encoder's latents, as `forward` does; each step more looks for better ones
                (`latent_search`), for the time of decoding forth and back.

        Raises:
            ValueError: for images of another number of channels or of a size that the stride does not divide, for NaN, and for a number
                of steps below 0.
        """
        target = self.normalize(pixel_values, check_range=True)
        if search_steps < 0:
            raise ValueError(f"search_steps must be at least 0, got {search_steps}")
        with torch.autocast(pixel_values.device.type, enabled=False), eval_mode(self):
            if search_steps and len(target):
                encode = partial(self._search, num_steps=search_steps)
                num_pixels = SEARCHED_PIXELS if target.device.type == "cpu" else SEARCHED_PIXELS_ON_GPU
                at_once = max(1, num_pixels // (target.shape[2] * target.shape[3]))
                return torch.cat([batch_invariant_encode(encode, some) for some in target.split(at_once)])
            return batch_invariant_encode(
                lambda some: flatten_codes(self._code(self._features(some), reconstruct=False).codes), target
            )

    def encode_with_search(self, pixel_values: Tensor) -> Tensor:
        """`b c h w` in [0, 1] -> codes `b n`, searched for by as many steps as the config's `search_steps`."""
        return self.encode(pixel_values, search_steps=self.config.search_steps)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, image_size: tuple[int, int] | None = None) -> Tensor:
        """Codes `b n`, or the first of them where codes of a cell add up, -> `b c h w` in [0, 1].

        Args:
            image_size: height and width of the images, where they are not those of the config.

        Raises:
            ValueError: for codes of another number, type or range.
        """
        cells = self.cells(image_size)
        lengths = [self.num_quantizers * rows * columns for rows, columns in cells]
        self.check_codes(codes, prefix=self.supports_prefix_decoding, num_codes=sum(lengths))
        context: Tensor | None = None
        with torch.autocast(codes.device.type, enabled=False), skip_validation():
            parts = codes.long().tensor_split(list(accumulate(lengths))[:-1], dim=1)
            for grid, some, (rows, columns) in zip(self.grids(), parts, cells, strict=True):
                context = grid.decoder(
                    plus(grid.from_code(self._look_up(grid.quantizer, some, rows, columns)), context)
                )
            assert context is not None
            return self.normalize.inverse(context)

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """The image `b c h w` after each level of the codes `b n` that it can be shown after."""
        step = self.positions_per_codebook[0] if self.supports_prefix_decoding else self.num_codes
        for last in range(step, codes.shape[1] + 1, step):
            yield self.decode(codes[:, :last])

    def forward(self, pixel_values: Tensor, reconstruction_loss: ReconstructionLoss | None = None) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> loss, reconstruction, codes and metrics; of another reconstruction loss than the config's, if given."""
        target = self.normalize(pixel_values)
        coded = self._code(self._features(target))
        measure = PIXEL_LOSSES[self.config.reconstruction_loss] if reconstruction_loss is None else reconstruction_loss
        return TokenizerOutput(
            loss=measure(coded.normalized, target) + coded.loss,
            reconstruction=self.normalize.inverse(coded.normalized),
            codes=flatten_codes(coded.codes),
            metrics={"mse": self.normalize.squared_error(coded.normalized, target), **self._usage()},
        )

    def _usage(self) -> dict[str, Tensor]:
        """What the quantizers of all grids say of their codes in training, on average; they count nothing else."""
        if not self.training:
            return {}
        metrics = [grid.quantizer.metrics() for grid in self.grids()]
        return {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}

    def _features(self, target: Tensor) -> list[Tensor]:
        """Normalised images `b c h w` -> what the encoder sees in them at each grid, `b c h w`, coarse to fine."""
        features = [self.encoder(channels_last(target))]
        for coarser in self.coarser:
            assert isinstance(coarser, TopGrid)
            features.append(coarser.down(features[-1]))
        return features[::-1]

    def _code(
        self,
        features: list[Tensor],
        offsets: Sequence[Tensor | None] = (),
        *,
        starting: bool = False,
        reconstruct: bool = True,
    ) -> QuantizedImages:
        """What becomes of images with such features, if that is asked for; `offsets` `b d h w` are added to the latents of each grid, and
        what codes leave of these is told then.

        What a finer grid codes, and what its decoder sees, has the decoded coarser grids added to it.
        """
        context: Tensor | None = None
        codes, losses, rests = [], [], []
        for grid, seen, offset in zip(self.grids(), features, offsets or [None] * len(features), strict=True):
            latents = plus(batch_invariant_conv1x1(grid.to_code, plus(seen, context)), offset)
            if starting:
                grid.quantizer.init_from_data(latents)
            quantized = grid.quantizer(latents)
            if reconstruct or grid is not self:
                context = grid.decoder(plus(grid.from_code(quantized.quantized), context))
            codes.append(quantized.codes)
            losses.append(quantized.loss)
            if offset is not None:
                rests.append((latents - quantized.quantized).detach())
        return QuantizedImages(features[-1] if context is None else context, codes, torch.stack(losses).sum(), rests)

    def _search(self, target: Tensor, *, num_steps: int) -> Tensor:
        """Codes `b n` of normalised images `b c h w`, the best of some steps."""
        cells = self.cells((target.shape[2], target.shape[3]))
        measure = PIXEL_LOSSES[self.config.reconstruction_loss]
        with torch.inference_mode(False):  # where what is copied may have gradients
            target = target.clone()
            offsets = [target.new_zeros(len(target), self.config.code_dim, *sides) for sides in cells]
            code = partial(self._code, self._features(target))
            return flatten_codes(search(code, target, offsets, measure=measure, num_steps=num_steps)[0])

    def _look_up(self, quantizer: Quantizer, codes: Tensor, rows: int, columns: int) -> Tensor:
        """Codes `b n` of a grid -> latents `b d h w`."""
        if not isinstance(quantizer, ResidualQuantizer):
            return quantizer.lookup(rearrange(codes, "b (h w) -> b h w", h=rows))
        num_codes = self.num_quantizers * rows * columns
        known = torch.arange(num_codes, device=codes.device) < codes.shape[1]
        padded = F.pad(codes, (0, num_codes - codes.shape[1]))
        return quantizer.lookup(
            rearrange(padded, "b (n h w) -> b h w n", h=rows, w=columns),
            None if codes.shape[1] == num_codes else rearrange(known, "(n h w) -> h w n", h=rows, w=columns),
        )


def plus(x: Tensor, context: Tensor | None) -> Tensor:
    """`b c h w` with the context of coarser grids, where there are any, added."""
    return x if context is None else x + context


def flatten_codes(codes: list[Tensor]) -> Tensor:
    """Codes of each grid, `b h w` or `b h w n`, -> `b n`, grid by grid and level by level."""
    return torch.cat(
        [each.flatten(1) if each.ndim == 3 else rearrange(each, "b h w n -> b (n h w)") for each in codes], dim=1
    )


def residual_stack(width: int, num_blocks: int) -> list[nn.Module]:
    """Residual blocks on the latent grid."""
    return [ResidualBlock(width, max(1, width // 2)) for _ in range(num_blocks)]
