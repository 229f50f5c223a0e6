"""Beam search over the codes of a VQ-DRAW model.

Greedy encoding takes the best option at every stage. A beam keeps several sequences, so that an
option which pays off later is not lost. The beam adapts: it keeps more sequences for an image if many
are nearly as good, and one if there is no doubt.
"""

import math

import torch
from torch import Tensor

from .core import VQDraw

# Upper limit of states per target, as a multiple of beam size x stages. For most digits the original
# MNIST model stays below it (error 0.0627 with 4 beams, 0.0626 without a limit). For noise, where it
# is never sure, it took 1.65 without a limit.
MAX_STATES_FACTOR = 1.4
PRUNING_MARGIN = 0.08  # allowed excess over the least error, relative, per doubling of the beam size


@torch.no_grad()
def beam_search(vqdraw: VQDraw, target: Tensor, beam_size: int) -> Tensor:
    """Search for the codes with the least error at the last stage.

    The original MNIST model evaluates 2.1, 4.5 and 9.1 times as many states as greedy encoding for
    digits with beams of 2, 4 and 8. Targets are searched in groups, so that memory never holds more
    states than greedy encoding would.

    Args:
        vqdraw: The stage loop.
        target: Targets, `b ...`.
        beam_size: Approximate cost, in multiples of greedy encoding; 1 is greedy encoding.

    Returns:
        Codes `b n`, the best sequence of the last beam.

    Raises:
        ValueError: If `beam_size` is below 1.
    """
    if beam_size < 1:
        raise ValueError(f"Expected beam_size of at least 1, got {beam_size}.")
    if beam_size == 1 or not len(target):
        return vqdraw(target).codes
    groups = target.split(max(1, len(target) // max(beam_widths(vqdraw.num_stages, beam_size))))
    return torch.cat([_search_group(vqdraw, group, beam_size) for group in groups])


def beam_widths(num_stages: int, beam_size: int) -> list[int]:
    """Return the maximum number of sequences to keep for a target after each stage.

    The first half of the stages keeps 2.25 x `beam_size`. Later stages keep fewer, the last one: the
    cost of an early choice shows late, that of a late choice immediately.
    """
    widest = 9 * beam_size / 4
    progress = (max(0.0, 2 * (stage + 1) / num_stages - 1) for stage in range(num_stages - 1))
    return [max(1, round(widest * (1 - 0.9 * each))) for each in progress] + [1]


def _search_group(vqdraw: VQDraw, target: Tensor, beam_size: int) -> Tensor:
    """Search the codes `b n` of targets `b ...`, with the sequences of all targets in one batch."""
    margin = PRUNING_MARGIN * math.log2(beam_size)
    owner = torch.arange(len(target), device=target.device)  # the target of each sequence, in order
    state, codes = vqdraw.initial_state(len(target)), owner.new_zeros(len(target), 0)
    budget = torch.full_like(owner, round(MAX_STATES_FACTOR * beam_size * vqdraw.num_stages))
    for stage, width in enumerate(beam_widths(vqdraw.num_stages, beam_size)):
        options = vqdraw.propose(state, stage)
        with torch.autocast(target.device.type, enabled=False):  # see `VQDraw.run_stage`
            errors = vqdraw.stage_loss(options, state, target[owner])
            # One state of the budget is reserved for each later stage.
            num_kept = (budget - vqdraw.num_stages + stage + 1).clamp(1, width)
            owner, parents, chosen = select_beams(errors, owner, num_kept, margin)
            state = state[parents] + options.select_examples(parents).gather_steps(chosen[:, None]).squeeze(1)
        budget -= owner.bincount()
        codes = torch.cat([codes[parents], chosen[:, None]], dim=1)
    return codes


def select_beams(errors: Tensor, owner: Tensor, num_kept: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best continuations of each target's sequences, best first.

    Args:
        errors: Error of every option of every sequence, `m k`.
        owner: Target of each sequence, sorted, `m`; each of the b targets has at least one.
        num_kept: Maximum number of continuations of each target, `b`.
        margin: Maximum excess over the target's least error, relative to it.

    Returns:
        For each selected continuation its target, the sequence it extends, and the option.
    """
    counts = owner.bincount()
    first = counts.cumsum(dim=0) - counts
    position = torch.arange(len(owner), device=owner.device) - first[owner]
    # Targets have different numbers of sequences: a table `b beams k`, with infinity where there is none.
    table = errors.new_full((len(counts), int(counts.max()), errors.shape[1]), math.inf)
    table[owner, position] = errors
    best_errors, index = table.flatten(1).topk(min(int(num_kept.max()), table[0].numel()), largest=False)
    least, rank = best_errors[:, :1], torch.arange(best_errors.shape[1], device=owner.device)
    is_kept = (best_errors <= least + margin * least.abs()) & (rank < num_kept[:, None])
    target, index = is_kept.nonzero()[:, 0], index[is_kept]
    return target, first[target] + index // errors.shape[1], index % errors.shape[1]
