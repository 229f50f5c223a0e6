"""Beam search over the codes of a VQ-DRAW model: better codes for the same decoder.

The greedy loop takes the best step at every stage. Here several of the best sequences so far go on, so a step that looks worse now and
pays later is not lost: more of them where many are nearly as good, one where an image leaves no doubt.
"""

import math

import torch
from torch import Tensor

from .core import VQDraw

# Of states to look at for one target, in beams x stages. The published MNIST model stays below it for most digits (0.0627 with 4 beams,
# 0.0626 without a limit); for noise, of which it is never sure, it took 1.65.
LIMIT = 1.4
MARGIN = 0.08  # how much worse than the best a sequence may be, as a share of its error, for each doubling of the beam


@torch.no_grad()
def beam_search(draw: VQDraw, target: Tensor, beam_size: int) -> Tensor:
    """Targets `b ...` -> codes `b n`, the best of the last beam.

    Args:
        beam_size: about what the search costs, in greedy loops; 1 is the greedy loop. The published MNIST model looks at 2.1, 4.5 and 9.1
            times as many states with beams of 2, 4 and 8 for digits; `LIMIT` times the beam are the most for any target. Targets go
            through in groups, so that no more states are held at once than the greedy loop would hold.

    Raises:
        ValueError: for a beam below 1.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    if beam_size == 1 or not len(target):
        return draw(target).codes
    groups = target.split(max(1, len(target) // max(widths(draw.num_stages, beam_size))))
    return torch.cat([search_group(draw, group, beam_size) for group in groups])


def widths(num_stages: int, beam_size: int) -> list[int]:
    """Sequences of one target to keep after each stage, at most: two beams and a quarter up to the middle, then ever fewer, and one.

    What an early choice costs shows later; what a late one costs shows at once.
    """
    early = 9 * beam_size / 4
    places = (max(0.0, 2 * (stage + 1) / num_stages - 1) for stage in range(num_stages - 1))
    return [max(1, round(early * (1 - 0.9 * place))) for place in places] + [1]


def search_group(draw: VQDraw, target: Tensor, beam_size: int) -> Tensor:
    """Targets `b ...` -> codes `b n`: at every stage the sequences of all targets as one batch."""
    margin = MARGIN * math.log2(beam_size)
    owner = torch.arange(len(target), device=target.device)
    state, codes = draw.initial_state(len(target)), owner.new_zeros(len(target), 0)
    left = torch.full_like(owner, round(LIMIT * beam_size * draw.num_stages))
    for stage, width in enumerate(widths(draw.num_stages, beam_size)):
        options = draw.propose(state, stage)
        with torch.autocast(target.device.type, enabled=False):  # as in `VQDraw.stage`
            errors = draw.stage_loss(options, state, target[owner])
            num = (left - draw.num_stages + stage + 1).clamp(1, width)  # each later stage needs one
            owner, parents, chosen = best_of_all(errors, owner, num, margin)
            state = state[parents] + options.select_examples(parents).gather_steps(chosen[:, None]).squeeze(1)
        left -= owner.bincount()
        codes = torch.cat([codes[parents], chosen[:, None]], dim=1)
    return codes


def best_of_all(errors: Tensor, owner: Tensor, num: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each target's sequences, best first.

    Args:
        errors: of every option of every sequence, `m k`. owner: the target that each belongs to, in order, `m`; each has one.
        num: continuations to keep for each target, at most, `b`. margin: how far above the least of its errors, as a share of that.

    Returns:
        For each that is kept: its target, the sequence that it extends, and the option.
    """
    counts = owner.bincount()
    first = counts.cumsum(dim=0) - counts
    place = torch.arange(len(owner), device=owner.device) - first[owner]
    table = errors.new_full((len(counts), int(counts.max()), errors.shape[1]), math.inf)
    table[owner, place] = errors
    found, index = table.flatten(1).topk(min(int(num.max()), table[0].numel()), largest=False)
    least, rank = found[:, :1], torch.arange(found.shape[1], device=owner.device)
    kept = (found <= least + margin * least.abs()) & (rank < num[:, None])
    target, index = kept.nonzero()[:, 0], index[kept]
    return target, first[target] + index // errors.shape[1], index % errors.shape[1]
