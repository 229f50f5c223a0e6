"""Settings that name a quantizer, and the quantizer they describe."""

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
    """Settings of the quantizer of a VQ-VAE, whatever that codes.

    Attributes:
        quantizer: "vector", "residual" or "fsq".
        code_dim: length of a codebook vector. codebook_dim: of those that are searched, behind a linear layer; 0: the same.
        num_quantizers: codebooks of a residual quantizer, whose entries add up.
        fsq_levels: of an FSQ, whose codebook size is their product.
        commitment: beta of equation 3. decay: of the codebook's moving average. ema: move the codebook by that average, not by a loss.
        gradient, revive, cosine: see `VectorQuantizer`.
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
        """Levels of a residual quantizer; 1 of any other."""
        return self.num_quantizers if self.quantizer == "residual" else 1


def build_quantizer(config: QuantizerConfig, *, channel_axis: int = 1) -> Quantizer:
    """The quantizer that a config describes, for `b d h w`; for `... d` with `channel_axis=-1`."""
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
