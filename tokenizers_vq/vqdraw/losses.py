"""Stage losses of VQ-DRAW: errors between states and targets.

Targets are normalized pixels `b c h w`, or symbols of a text `b t`. Each loss defines what a state
holds. The formulas are those of torch's losses of the same names, as a mean for each option.
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

CONFIDENT_LOGIT = 3.0  # logit of a black or white pixel in a target state: a probability of 0.95
CONFIDENT_SYMBOL_LOGIT = 8.0  # the same for one symbol among a few hundred
# Logits of one option that the search computes together. On a CPU all options then fit into its cache.
MAX_LOGITS, MAX_LOGITS_ON_CPU = 2**20, 2**12
# float32 holds exp(-87) to exp(88). `_cross_entropies_by_products` sums exponentials exactly if the
# logits of a state differ by less than the first number and the sums are above the second.
MAX_LOGIT_RANGE, MIN_SUM = 80.0, math.exp(-60)


class MSELoss:
    """Mean squared error. The state is the image, `b c h w`."""

    channel_multiplier = 1

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of every option, `b k`."""
        return options.squared_errors(target - state)

    def target_state(self, target: Tensor) -> Tensor:
        """Return the target itself."""
        return target

    def reconstruct(self, state: Tensor) -> Tensor:
        """Return the state itself."""
        return state


class GaussianNLLLoss:
    """Negative log-likelihood of pixels under normal distributions.

    The state holds means, then logarithms of standard deviations: `b (2 c) h w`.
    """

    channel_multiplier = 2

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Return the mean negative log-likelihood under every option, nats per value, `b k`."""
        mean, log_std = (state[:, None] + options.all_steps()).chunk(2, dim=2)
        scaled = (target[:, None] - mean) * torch.exp(-log_std)
        return (0.5 * scaled.square() + log_std).flatten(2).mean(dim=2) + 0.5 * math.log(2 * math.pi)

    def target_state(self, target: Tensor) -> Tensor:
        """Return the target as mean, with a standard deviation of one."""
        return torch.cat([target, torch.zeros_like(target)], dim=1)

    def reconstruct(self, state: Tensor) -> Tensor:
        """Return the mean, `b c h w`."""
        return state.chunk(2, dim=1)[0]


class BCELoss:
    """Binary cross-entropy of pixels in [0, 1]. The state holds logits, `b c h w`.

    Args:
        config: Image config. Its `pixel_mean` and `pixel_std` turn normalized targets into pixels. They
            are read at each call, because a config may change after the model was built.
    """

    channel_multiplier = 1

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of every option, nats per value, `b k`."""
        logits = state[:, None] + options.all_steps()
        pixels = self.denormalize(target)[:, None].expand_as(logits)
        errors = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
        return errors.flatten(2).mean(dim=2)

    def denormalize(self, target: Tensor) -> Tensor:
        """Convert normalized pixels to [0, 1]."""
        return (target * self.config.pixel_std + self.config.pixel_mean).clamp(0, 1)

    def target_state(self, target: Tensor) -> Tensor:
        """Return logits whose probabilities are close to the target."""
        return CONFIDENT_LOGIT * (2 * self.denormalize(target) - 1)

    def reconstruct(self, state: Tensor) -> Tensor:
        """Return the probabilities, normalized."""
        return (state.sigmoid() - self.config.pixel_mean) / self.config.pixel_std


class CrossEntropyLoss:
    """Cross-entropy of symbols. The state holds logits, `b t v`.

    Args:
        num_symbols: Number of symbols, v.
    """

    def __init__(self, num_symbols: int):
        self.num_symbols = num_symbols

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every option, nats, summed over positions and divided by t, `b k`.

        Without a gradient a few examples at a time are computed in place, so that memory never holds
        the logits of a batch, `b k t v`. Options that all examples share are computed once.

        Args:
            options: Options of the stage.
            state: Logits, `b t v`.
            target: Symbols `b t`; `IGNORE_INDEX` where the error counts as zero.
        """
        is_shared = isinstance(options, SharedOptions)
        if is_shared and not torch.is_grad_enabled() and not state.any():
            log_probs = options.shared_steps().log_softmax(dim=2)  # `k t v`, of all examples
            positions = torch.arange(target.shape[1], device=target.device)
            log_likelihoods = rearrange(log_probs[:, positions, target.clamp(min=0)], "k b t -> b k t")
            return _mean_over_valid(-log_likelihoods, target)
        if is_shared or torch.is_grad_enabled():
            return _cross_entropies(state[:, None] + options.all_steps(), target)
        max_logits = MAX_LOGITS_ON_CPU if state.device.type == "cpu" else MAX_LOGITS
        groups = torch.arange(len(target), device=target.device).split(max(1, max_logits // state.shape[1:].numel()))
        return torch.cat(
            [_cross_entropies_by_products(options.select_examples, group, state, target) for group in groups]
        )

    def target_state(self, target: Tensor) -> Tensor:
        """Return logits that are confident of the target, and zero at ignored positions."""
        symbols = F.one_hot(target.clamp(min=0), self.num_symbols)
        return CONFIDENT_SYMBOL_LOGIT * symbols * (target != IGNORE_INDEX)[..., None]

    def reconstruct(self, state: Tensor) -> Tensor:
        """Return the most likely symbols, `b t`."""
        return state.argmax(dim=2)


def _cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropies of logits `b k t v` and symbols `b t`, the plain form, `b k`."""
    symbols = target[:, None].expand(logits.shape[:3])
    errors = F.cross_entropy(logits.flatten(0, 2), symbols.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return errors.view(symbols.shape).sum(dim=2) / target.shape[1]


def _cross_entropies_by_products(
    select_examples: Callable[[Tensor], Options], group: Tensor, state: Tensor, target: Tensor
) -> Tensor:
    """Compute the cross-entropies of some examples without a gradient, `n k`.

    The sum of exp(state + step) is a matrix product of exp(step) and exp(state), so the logits are
    never computed. If it leaves the range that float32 sums exactly, the plain form is used.
    Measured: 0.6 of the plain time for 128 positions of 283 symbols, the same for short spans.

    Args:
        select_examples: Function that computes the options of examples. It is called again for the
            plain form, because the exponentials overwrite the steps.
        group: Indices of the examples, `n`.
        state: Logits of all examples, `b t v`.
        target: Symbols of all examples, `b t`.
    """
    state, target = state[group], target[group]
    least, largest = state.aminmax(dim=2, keepdim=True)
    if state.numel() and (largest - least).amax() < MAX_LOGIT_RANGE:
        steps = select_examples(group).all_steps()
        target_logits = (
            _gather_logits(steps, target)
            + _gather_logits(state[:, None], target)
            - rearrange(largest, "b t 1 -> b 1 t")
        )
        sums = einsum(steps.exp_(), (state - largest).exp(), "b k t v, b t v -> b k t")
        if sums.amin() > MIN_SUM and sums.amax() < math.inf:
            return _mean_over_valid(sums.log() - target_logits, target)
    return _cross_entropies(state[:, None] + select_examples(group).all_steps(), target)


def _gather_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Gather the logits of the target symbols: `b k t v`, `b t` -> `b k t`."""
    symbols = target.clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    return logits.gather(3, symbols).squeeze(3)


def _mean_over_valid(errors: Tensor, target: Tensor) -> Tensor:
    """Average errors `b k t` over all t, with zero for ignored positions, `b k`."""
    return (errors * (target != IGNORE_INDEX)[:, None]).sum(dim=2) / target.shape[1]
