"""Sample one code from logits: the settings, the noise and the filters.

Every image has its own stream of uniform numbers, one per code. A code is the inverse of the cumulative
distribution at its number, so an image does not depend on the batch it is generated in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

Guidance = float | Sequence[float] | Callable[[float], float]
# Key of ours in generation_config.json. Its own `guidance_scale` would make stock `generate` apply
# a guidance that takes the last token for the prompt.
GUIDANCE_KEY = "image_guidance_scale"
BELOW_ONE = math.nextafter(1, 0)  # the largest float64 below 1


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a prior.

    Attributes:
        guidance_scale: Scale of classifier-free guidance (Ho & Salimans 2022; for tokens Gafni et al. 2022).
            1 = without guidance. Several numbers are a schedule: `(1, 4)` rises linearly from the first code to
            the last, and as many numbers as codes give each code its own. A function maps the position in
            the image, 0 to 1, to a scale; it cannot be saved.
        temperature: Softmax temperature; 0 is greedy.
        top_k: Sample from the k most likely codes (0 = all).
        top_p: Sample from the smallest set of codes whose total probability is at least p.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> from tok2img import Sampling
        >>> Sampling(guidance_scale=(1, 3), top_k=50).guidance_schedule(5)
        [1.0, 1.5, 2.0, 2.5, 3.0]
    """

    guidance_scale: Guidance = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.guidance_scale, Sequence):
            object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
            if not self.guidance_scale:
                raise ValueError("guidance_scale must be a number, or several for a schedule, got none")
        for scale in self._schedule_points():
            check_number("guidance_scale", scale)
        for name in ("temperature", "top_k", "top_p"):
            check_number(name, getattr(self, name))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Expected top_p above 0 and at most 1, got {self.top_p}.")
        if self.top_k != int(self.top_k):
            raise ValueError(f"Expected top_k to be an integer, got {self.top_k}.")

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> Self:
        """Read the settings that a model was saved with.

        Args:
            config: The prior's generation config.
        """
        return cls(
            guidance_scale=getattr(config, GUIDANCE_KEY, 1.0),
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
        )

    def write_to(self, config: GenerationConfig) -> None:
        """Make these settings the defaults of a model.

        Args:
            config: The prior's generation config, changed in place.

        Raises:
            ValueError: If the guidance scale is a function.
        """
        if callable(self.guidance_scale):
            raise ValueError("Expected guidance_scale to be numbers, got a function, which cannot be saved.")
        config.do_sample, config.temperature = True, self.temperature
        config.top_k, config.top_p = self.top_k, self.top_p
        scale = self.guidance_scale
        setattr(config, GUIDANCE_KEY, list(scale) if isinstance(scale, tuple) else scale)

    def guidance_schedule(self, num_codes: int) -> list[float]:
        """Return the guidance scale of each code of an image.

        Args:
            num_codes: Number of codes of an image.

        Raises:
            ValueError: If the schedule has more numbers than there are codes, or a function returns an
                invalid scale.
        """
        positions = np.linspace(0, 1, num_codes).tolist()
        if callable(self.guidance_scale):
            scales = [self.guidance_scale(position) for position in positions]
            for scale in scales:
                check_number("guidance_scale", scale)
            return scales
        points = self._schedule_points()
        if len(points) > num_codes:
            raise ValueError(
                f"Expected at most one guidance_scale per code, got {len(points)} numbers for {num_codes} codes."
            )
        return np.interp(positions, np.linspace(0, 1, len(points)), points).tolist()

    def _schedule_points(self) -> list[Any]:
        """Return the numbers given as guidance scale; none if it is a function."""
        if callable(self.guidance_scale):
            return []
        return list(self.guidance_scale) if isinstance(self.guidance_scale, Sequence) else [self.guidance_scale]


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number of at least 0."""
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def random_seed() -> int:
    """Return a random seed, from the operating system's entropy."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def uniform_noise(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """Draw one stream of uniform numbers for each (seed, index).

    Philox is a counter-based generator keyed by both, so streams are independent and need no order.

    Args:
        seed: The seed, any integer.
        indices: The index of each of `b` images.
        length: Numbers per stream, `n`.

    Returns:
        Numbers in [0, 1), `b n` float64.
    """
    keys = [np.array([seed % 2**64, index], dtype=np.uint64) for index in indices]
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=key)).random(length) for key in keys]))


def slerp_noise(first: Tensor, last: Tensor, num_steps: int) -> Tensor:
    """Interpolate between two streams of uniform noise.

    Uniform numbers are mapped to normal ones, which spherical interpolation keeps normal (White 2016), and
    back. So every step is as uniform as the ends.

    Args:
        first: The first stream, `n`.
        last: The last stream, `n`.
        num_steps: Number of streams, ends included.

    Returns:
        Streams, `b n`; the first and the last equal the given ones exactly.

    Raises:
        ValueError: If there are fewer than 2 steps.
    """
    if num_steps < 2:
        raise ValueError(f"Expected a path of at least 2 steps, its ends, got {num_steps}.")
    angles = torch.linspace(0, math.pi / 2, num_steps, dtype=torch.float64)[:, None]
    # The normal quantile of 0 is minus infinity.
    smallest = torch.finfo(torch.float64).tiny
    start, end = (torch.special.ndtri(stream.double().clamp_min(smallest)) for stream in (first, last))
    path = torch.special.ndtr(angles.cos() * start + angles.sin() * end).clamp_max(BELOW_ONE)
    path[0], path[-1] = first, last
    return path


def apply_guidance(logits: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance: unconditional + scale x (conditional - unconditional).

    Args:
        logits: Conditional logits above unconditional ones, `(2 b) k`.
        scale: The guidance scale.

    Returns:
        Guided logits, `b k`.
    """
    conditional, unconditional = logits.chunk(2)
    # At scale 1 the formula would round; returning the logits gives the same codes as no guidance.
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


def sample_codes(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Sample one code per row by the inverse of the cumulative distribution.

    Args:
        logits: Logits of the codes, `b k`.
        uniforms: Uniform numbers in [0, 1), `b`.
        sampling: Temperature, top-k and top-p.

    Returns:
        Codes, `b` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # float64: in float32 the cumulative sum over a large codebook would be off by more than a rare
    # code's probability.
    probabilities = top_k_top_p_filter((logits.double() / sampling.temperature).softmax(dim=-1), sampling)
    cumulative = probabilities.cumsum(dim=-1)
    targets = uniforms.to(logits.device)[:, None] * cumulative[:, -1:]
    # With right=True a code of probability zero is never the first to exceed its target.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def top_k_top_p_filter(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Set the probabilities outside top-k and top-p (Holtzman et al. 2020) to zero.

    Args:
        probabilities: Probabilities of the codes, `b k`.
        sampling: Top-k and top-p.

    Returns:
        Probabilities that need not sum to 1, `b k`. The most likely code always stays.
    """
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    mask = before < sampling.top_p * ordered.sum(dim=-1, keepdim=True)
    if sampling.top_k:
        mask[:, sampling.top_k :] = False
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered * mask)
