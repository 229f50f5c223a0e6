"""Processes that train together: which of them this one is, and what they have to agree on.

Sums are summed over all, and what is drawn at random is drawn by the first. Of one process alone all of it is the thing itself.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether other processes train with this one."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of what all processes have, in all of them; written into the tensor itself."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_coalesced(*parts: Tensor) -> tuple[Tensor, ...]:
    """The sums of several tensors of one type over all processes, in one call; of one process alone the tensors as they are."""
    if not is_distributed():
        return parts
    flat = all_reduce_sum(torch.cat([part.flatten() for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))


def broadcast_from_rank0(drawn: Tensor) -> Tensor:
    """What the first process has, in all of them; written into the tensor itself."""
    if is_distributed():
        dist.broadcast(drawn, src=0)
    return drawn


def local_exponential_noise(like: Tensor) -> Tensor:
    """Exponential noise for values `n`: this process's part of one draw for all of them, as long as they draw alike."""
    return like.new_empty(get_world_size(), len(like)).exponential_()[get_rank()]


def local_slices(of_all: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Of one draw `n ...` for all rows of a step, what falls on each batch of this process; all processes have batches of these sizes."""
    return list(of_all.split([size for size in sizes for _ in range(get_world_size())])[get_rank() :: get_world_size()])


def all_reduce_top_k(keys: Tensor, rows: Tensor) -> Tensor:
    """Of the rows `k d` of all processes the `k` with the highest keys `k`, best first; those with a key of minus infinity do not count.

    Where there are fewer than `k`, they come again from the start.
    """
    all_keys = keys.new_zeros(get_world_size(), len(keys))
    all_keys[get_rank()] = keys
    all_keys = all_reduce_sum(all_keys).flatten()
    num_there = (all_keys > -torch.inf).sum().clamp(1, len(keys))
    best = all_keys.argsort(descending=True)[torch.arange(len(keys), device=keys.device) % num_there]
    is_own = best // len(keys) == get_rank()
    return all_reduce_sum(torch.where(is_own[:, None], rows[best % len(keys)], 0))
