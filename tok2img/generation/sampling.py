"""How one code is drawn: the settings, the random numbers, and logits -> codes.

Every image has a stream of its own, one uniform number a code, turned into a code by the inverse of the cumulative distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Guidance = float | Sequence[float] | Callable[[float], float]
# The largest number below 1: what a stream may hold at most.
BELOW_ONE = math.nextafter(1, 0)


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn.

    Attributes:
        guidance_scale: 1 follows the caption as trained; above, logits move on by that much from those without a caption
            (Ho & Salimans 2022, as in Gafni et al. 2022 for tokens). Several numbers are a schedule: `(1, 4)` rises in a line from the
            first code to the last, and as many as there are codes give each its own. So is a function of how far the image is, 0 to 1;
            it cannot be saved.
        temperature: 0 takes the likeliest code.
        top_k: draw among so many of the likeliest codes; 0: all.
        top_p: draw among the likeliest codes that together have this probability.

    Raises:
        ValueError: for a value out of range.
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
            raise ValueError(f"top_p must lie above 0 and not above 1, got {self.top_p}")
        if self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be a whole number of codes, got {self.top_k}")

    def guidance_schedule(self, num_codes: int) -> list[float]:
        """The guidance scale of each code of an image."""
        shares = np.linspace(0, 1, num_codes).tolist()
        if callable(self.guidance_scale):
            scales = [self.guidance_scale(share) for share in shares]
            for scale in scales:
                check_number("guidance_scale", scale)
            return scales
        knots = self._schedule_points()
        if len(knots) > num_codes:
            raise ValueError(f"guidance_scale has {len(knots)} numbers for {num_codes} codes")
        return np.interp(shares, np.linspace(0, 1, len(knots)), knots).tolist()

    def _schedule_points(self) -> list[Any]:
        """The numbers given as guidance; none of a function."""
        if callable(self.guidance_scale):
            return []
        return list(self.guidance_scale) if isinstance(self.guidance_scale, Sequence) else [self.guidance_scale]


def check_number(name: str, value: Any) -> None:
    """ValueError for anything but a finite number of at least 0."""
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def random_seed() -> int:
    """A seed that nobody has chosen."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def uniform_noise(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """One stream of uniform numbers for each (seed, index), `b n` float64: Philox, a counter-based generator, keyed by both."""
    keys = [np.array([seed % 2**64, index], dtype=np.uint64) for index in indices]
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=key)).random(length) for key in keys]))


def streams_of_rows(num_rows: int, length: int, *, seed: int, indices: Sequence[int] | None = None) -> Tensor:
    """The streams of rows `b` in a batch, `b n`: those of their indices, `0..b-1` when left out."""
    return uniform_noise(seed, range(num_rows) if indices is None else indices, length)


def slerp_noise(first: Tensor, last: Tensor, num_steps: int) -> Tensor:
    """Streams that lead from one to another in even steps, `n` and `n` -> `b n`; the ends are the given streams to the last bit.

    Through the normal quantile: normal numbers turned into one another by an angle stay normal (slerp, White 2016), so every step in
    between is as uniform as the ends.
    """
    if num_steps < 2:
        raise ValueError(f"a path has at least 2 steps, its ends, got {num_steps}")
    angles = torch.linspace(0, math.pi / 2, num_steps, dtype=torch.float64)[:, None]
    least = torch.finfo(torch.float64).tiny
    start, end = (torch.special.ndtri(stream.double().clamp_min(least)) for stream in (first, last))
    path = torch.special.ndtr(angles.cos() * start + angles.sin() * end).clamp_max(BELOW_ONE)
    path[0], path[-1] = first, last
    return path


def apply_guidance(logits: Tensor, scale: float) -> Tensor:
    """Rows with caption above rows without, `2b k` -> `b k`: without + scale x (with - without)."""
    conditional, unconditional = logits.chunk(2)
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


def sample_codes(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Logits `b k` and uniforms `b` -> codes `b`, by the inverse of the cumulative distribution."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = top_k_top_p_filter((logits.double() / sampling.temperature).softmax(dim=-1), sampling)
    cumulative = probabilities.cumsum(dim=-1)
    targets = uniforms.to(logits.device)[:, None] * cumulative[:, -1:]
    # A code of probability zero is never the first whose cumulative share exceeds the target.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def top_k_top_p_filter(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero for codes outside top-k and top-p (Holtzman et al. 2020), `b k` -> `b k`; the likeliest always stays."""
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = before < sampling.top_p * ordered.sum(dim=-1, keepdim=True)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered * keep)
