"""Settings of a quantizer, and the function that builds it."""

import math
from dataclasses import field

from ..base import DiscreteTokenizerConfig
from ..validation import check_choice, check_counts, check_number
from .fsq import FSQ
from .gradient_estimators import GRADIENTS
from .residual_quantizer import ResidualQuantizer
from .vector_quantizer import VectorQuantizer

QUANTIZERS = ("vector", "residual", "fsq")
Quantizer = VectorQuantizer | ResidualQuantizer | FSQ


class QuantizerConfig(DiscreteTokenizerConfig):
    """Settings of the quantizer of a VQ-VAE for any modality.

    Attributes:
        quantizer: "vector" (default; one codebook), "residual" (several codebooks whose entries add
            up) or "fsq" (rounded numbers without a codebook).
        codebook_size: Entries of each codebook. An FSQ has the product of its `fsq_levels` instead.
        code_dim: Channels of the latents that are quantized, 64 by default.
        codebook_dim: Length of the entries, reached through a linear projection. 0 (default) =
            `code_dim`.
        num_quantizers: Codebooks of a residual quantizer, i.e. codes per vector. Others have one.
        fsq_levels: Levels of each number of an FSQ. The default makes 1,000 codes.
        commitment_weight: Beta of equation 3 in van den Oord et al. 2017, where it is 0.25 as here.
        decay: Decay of the codebook's moving averages. The default 0.99 averages over about 100
            steps.
        ema_update: True (default) = move the codebook by moving averages. False = by gradients.
        gradient: "straight_through" (default) or "rotation_trick" (Fifty et al. 2024).
        replace_dead_codes: True (default) = move codes that are hardly used to vectors with large
            errors.
        use_cosine_sim: True = compare the directions of vectors. False (default) = their distances.
    """

    quantizer: str = "vector"
    codebook_size: int = 512
    code_dim: int = 64
    codebook_dim: int = 0
    num_quantizers: int = 4
    fsq_levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    commitment_weight: float = 0.25
    decay: float = 0.99
    ema_update: bool = True
    gradient: str = "straight_through"
    replace_dead_codes: bool = True
    use_cosine_sim: bool = False

    def __post_init__(self, **other: object) -> None:
        super().__post_init__(**other)
        check_choice("quantizer", self.quantizer, QUANTIZERS)
        check_choice("gradient", self.gradient, GRADIENTS)
        if self.quantizer == "fsq":
            check_counts("fsq_levels", self.fsq_levels, least=2)
            self.codebook_size = math.prod(self.fsq_levels)
            check_number(type(self).__name__, "codebook_size", self.codebook_size, 1)

    @property
    def codes_per_vector(self) -> int:
        """Number of codes of a vector: `num_quantizers` of a residual quantizer, else 1."""
        return self.num_quantizers if self.quantizer == "residual" else 1


def build_quantizer(config: QuantizerConfig, *, channel_axis: int = 1) -> Quantizer:
    """Build the quantizer that a config describes.

    Args:
        config: The settings.
        channel_axis: Axis of the channels: 1 for `b d h w`, -1 for `... d`.
    """
    if config.quantizer == "fsq":
        return FSQ(config.fsq_levels, config.code_dim, channel_axis=channel_axis)
    settings = {
        name: getattr(config, name)
        for name in ("commitment_weight", "decay", "ema_update", "gradient", "replace_dead_codes", "use_cosine_sim")
    }
    settings |= {"codebook_dim": config.codebook_dim, "channel_axis": channel_axis}
    if config.quantizer == "residual":
        return ResidualQuantizer(config.codebook_size, config.code_dim, config.num_quantizers, **settings)
    return VectorQuantizer(config.codebook_size, config.code_dim, **settings)
