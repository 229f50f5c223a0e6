"""Processes that train together: which of them this one is, and what they have to agree on.

Sums are summed over all, and what is drawn at random is drawn by the first. Of one process alone all of it is the thing itself.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def among_ranks() -> bool:
    """Whether other processes train with this one."""
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if among_ranks() else 1


def own_rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if among_ranks() else 0


def summed_over_ranks(values: Tensor) -> Tensor:
    """The sum of what all processes have, in all of them; written into the tensor itself."""
    if among_ranks():
        dist.all_reduce(values)
    return values


def each_summed_over_ranks(*parts: Tensor) -> tuple[Tensor, ...]:
    """The sums of several tensors of one type over all processes, in one call; of one process alone the tensors as they are."""
    if not among_ranks():
        return parts
    flat = summed_over_ranks(torch.cat([part.flatten() for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


def of_first_rank(drawn: Tensor) -> Tensor:
    """What the first process has, in all of them; written into the tensor itself."""
    if among_ranks():
        dist.broadcast(drawn, src=0)
    return drawn


def own_part_of_noise(like: Tensor) -> Tensor:
    """Exponential noise for values `n`: this process's part of one draw for all of them, as long as they draw alike."""
    return like.new_empty(num_ranks(), len(like)).exponential_()[own_rank()]


def own_shares(of_all: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Of one draw `n ...` for all rows of a step, what falls on each batch of this process; all processes have batches of these sizes."""
    return list(of_all.split([size for size in sizes for _ in range(num_ranks())])[own_rank() :: num_ranks()])


def best_of_ranks(keys: Tensor, rows: Tensor) -> Tensor:
    """Of the rows `k d` of all processes the `k` with the highest keys `k`, best first; those with a key of minus infinity do not count.

    Where there are fewer than `k`, they come again from the start.
    """
    all_keys = keys.new_zeros(num_ranks(), len(keys))
    all_keys[own_rank()] = keys
    all_keys = summed_over_ranks(all_keys).flatten()
    num_there = (all_keys > -torch.inf).sum().clamp(1, len(keys))
    best = all_keys.argsort(descending=True)[torch.arange(len(keys), device=keys.device) % num_there]
    is_own = best // len(keys) == own_rank()
    return summed_over_ranks(torch.where(is_own[:, None], rows[best % len(keys)], 0))
