"""How far a VQ-DRAW state is from what it should be.

Targets are normalised pixels, `b c h w`, or symbols of a text, `b t`; what a state holds depends on the error.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ..text_base import IGNORE_INDEX
from .options import Options, SharedOptions

CONFIDENT_LOGIT = 3.0  # logit of a pixel that is black or white: 0.95
CONFIDENT_SYMBOL_LOGIT = 8.0  # logit of the right one among some hundred
# Of one option, for which the search proposes together: on a CPU about what fits a cache with all options.
LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_CPU = 2**20, 2**12
# What float32, which holds exp(-87) to exp(88), sums exactly: states of this range of logits, sums of exponentials above this.
WIDEST_STATE, SMALLEST_SUM = 80.0, math.exp(-60)


class MSELoss:
    """The state is the image."""

    state_channels = 1

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of every proposal against the target, `b k`."""
        return options.squared_errors(target - state)

    def target_state(self, target: Tensor) -> Tensor:
        """The target."""
        return target

    def reconstruct(self, state: Tensor) -> Tensor:
        """The state."""
        return state


class GaussianNLLLoss:
    """The state holds a mean and the logarithm of a standard deviation for each pixel and channel: `b 2c h w`."""

    state_channels = 2

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Mean negative log likelihood of the target under every proposal, nats a value of a pixel, `b k`."""
        mean, log_std = (state[:, None] + options.all_steps()).chunk(2, dim=2)
        scaled = (target[:, None] - mean) * torch.exp(-log_std)
        return (0.5 * scaled.square() + log_std).flatten(2).mean(dim=2) + 0.5 * math.log(2 * math.pi)

    def target_state(self, target: Tensor) -> Tensor:
        """The target as mean, with a standard deviation of one."""
        return torch.cat([target, torch.zeros_like(target)], dim=1)

    def reconstruct(self, state: Tensor) -> Tensor:
        """The mean."""
        return state.chunk(2, dim=1)[0]


class BCELoss:
    """The state holds the logit of each pixel, which is black or white.

    Args:
        config: its `pixel_mean` and `pixel_std`, as they are when asked, are those of the normalisation that targets come in.
    """

    state_channels = 1

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Mean negative log likelihood of the target under every proposal, nats a value of a pixel, `b k`."""
        logits = state[:, None] + options.all_steps()
        pixels = self.pixels(target)[:, None].expand_as(logits)
        errors = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
        return errors.flatten(2).mean(dim=2)

    def pixels(self, target: Tensor) -> Tensor:
        """Normalised -> [0, 1]."""
        return (target * self.config.pixel_std + self.config.pixel_mean).clamp(0, 1)

    def target_state(self, target: Tensor) -> Tensor:
        """Logits that come near the target."""
        return CONFIDENT_LOGIT * (2 * self.pixels(target) - 1)

    def reconstruct(self, state: Tensor) -> Tensor:
        """Probabilities, normalised."""
        return (state.sigmoid() - self.config.pixel_mean) / self.config.pixel_std


class CrossEntropyLoss:
    """The state holds a logit for every symbol at each position, `b t v`; targets are symbols `b t`, or `IGNORE_INDEX`."""

    def __init__(self, num_symbols: int):
        self.num_symbols = num_symbols

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the target under every proposal, nats, summed over positions and divided by their number, `b k`.

        Where no gradient is wanted, a few examples at a time and in place: the proposals of a batch, `b k t v`, need never stand in
        memory at once. And where all examples have the same state and steps, as at stage 0, once for all.
        """
        shared = isinstance(options, SharedOptions)
        if shared and not torch.is_grad_enabled() and not state.any():
            return shared_cross_entropies(options.shared_steps(), target)
        if shared or torch.is_grad_enabled():
            return cross_entropies(state[:, None] + options.all_steps(), target)
        at_once = LOGITS_AT_ONCE_ON_CPU if state.device.type == "cpu" else LOGITS_AT_ONCE
        groups = torch.arange(len(target), device=target.device).split(max(1, at_once // state.shape[1:].numel()))
        return torch.cat([cross_entropies_after(options.select_examples, group, state, target) for group in groups])

    def target_state(self, target: Tensor) -> Tensor:
        """Logits that are sure of the target, and zero where it does not matter."""
        symbols = F.one_hot(target.clamp(min=0), self.num_symbols)
        return CONFIDENT_SYMBOL_LOGIT * symbols * (target != IGNORE_INDEX)[..., None]

    def reconstruct(self, state: Tensor) -> Tensor:
        """The likeliest symbols, `b t`."""
        return state.argmax(dim=2)


def cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """Logits `b k t v` of what the symbols `b t` should be -> nats, a mean over positions, `b k`."""
    symbols = target[:, None].expand(logits.shape[:3])
    errors = F.cross_entropy(logits.flatten(0, 2), symbols.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return errors.view(symbols.shape).sum(dim=2) / target.shape[1]


def shared_cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """`cross_entropies` of logits `k t v` that all examples share."""
    positions = torch.arange(target.shape[1], device=target.device)
    right = logits.log_softmax(dim=2)[:, positions, target.clamp(min=0)]
    return mean_over_live(-right.transpose(0, 1), target)


def cross_entropies_after(select: Callable[[Tensor], Options], group: Tensor, state: Tensor, target: Tensor) -> Tensor:
    """`cross_entropies` of the states `b t v` of some examples after each of their options, without gradient.

    The sum of exp(state + step) is a product of exp(step) with exp(state): the logits themselves are never made. Where it leaves what
    float32 sums exactly, the plain way is taken. Of 128 positions of 283 symbols in 0.6 of its time; of short spans of few in no less.

    Args:
        select: makes the options of examples, anew each time, for their steps are used up.
        group: the examples, named by their numbers `n`.
    """
    state, target = state[group], target[group]
    least, largest = state.aminmax(dim=2, keepdim=True)
    if state.numel() and (largest - least).amax() < WIDEST_STATE:
        steps = select(group).all_steps()
        right = logits_of(steps, target) + logits_of(state[:, None], target) - rearrange(largest, "b t 1 -> b 1 t")
        sums = einsum(steps.exp_(), (state - largest).exp(), "b k t v, b t v -> b k t")
        if sums.amin() > SMALLEST_SUM and sums.amax() < math.inf:
            return mean_over_live(sums.log() - right, target)
    return cross_entropies(state[:, None] + select(group).all_steps(), target)


def logits_of(logits: Tensor, target: Tensor) -> Tensor:
    """Of logits `b k t v` those of the symbols `b t`: `b k t`."""
    symbols = target.clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    return logits.gather(3, symbols).squeeze(3)


def mean_over_live(errors: Tensor, target: Tensor) -> Tensor:
    """Errors `b k t` -> `b k`, zero counted for positions that do not matter."""
    return (errors * (target != IGNORE_INDEX)[:, None]).sum(dim=2) / target.shape[1]
