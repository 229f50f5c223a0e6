"""Collectives of `torch.distributed` that do nothing in a single process.

Codebooks are buffers that learn from the data itself, not from gradients, so DDP does not keep them
equal. The functions here do: statistics are summed over all ranks, and random numbers are drawn by
rank 0 or sliced from one draw that all ranks make alike.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return True if this process trains together with others."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_coalesced(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of several tensors of one dtype over all ranks, in a single collective.

    In a single process the tensors themselves are returned, not copies.
    """
    if not is_distributed():
        return tensors
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
    sums = flat.split([tensor.numel() for tensor in tensors])
    return tuple(each.view_as(tensor) for each, tensor in zip(sums, tensors, strict=True))


def broadcast_from_rank0(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, in place."""
    if is_distributed():
        dist.broadcast(values, src=0)
    return values


def local_slices(draw: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Slice one draw for all rows of a training step into the parts for this rank's batches.

    The draw is ordered by batch, then by rank, so that two ranks see the numbers that one rank
    would have drawn for the same rows.

    Args:
        draw: Random numbers `n ...` for all rows of all ranks.
        sizes: Number of rows of each of this rank's batches; the same on all ranks.

    Returns:
        One slice per batch.
    """
    world_size = get_world_size()
    return list(draw.split([size for size in sizes for _ in range(world_size)])[get_rank() :: world_size])


def all_reduce_top_k(keys: Tensor, rows: Tensor) -> Tensor:
    """Return the rows with the highest keys among all ranks, best first.

    Args:
        keys: Keys `k` of this rank's rows. A row with key minus infinity is not eligible.
        rows: Rows `k d`.

    Returns:
        Rows `k d`, the same on all ranks. If fewer than `k` rows are eligible, they repeat in
        order.
    """
    all_keys = keys.new_zeros(get_world_size(), len(keys))
    all_keys[get_rank()] = keys
    all_keys = all_reduce_sum(all_keys).flatten()
    # At least 1, or the modulo would divide by zero where no row is eligible.
    num_eligible = (all_keys > -torch.inf).sum().clamp(1, len(keys))
    best = all_keys.argsort(descending=True)[torch.arange(len(keys), device=keys.device) % num_eligible]
    is_local = best // len(keys) == get_rank()
    # Each rank fills in its own rows and zeros elsewhere, so the sum collects them.
    return all_reduce_sum(torch.where(is_local[:, None], rows[best % len(keys)], 0))
