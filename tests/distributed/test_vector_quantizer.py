"""Training one codebook on two processes, each with its own data."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file

from tokenizers_vq import ResidualQuantizer, VectorQuantizer


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def join(rank: int, port: int) -> None:
    """Join a process group of two."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )


def train(rank: int, port: int, num_quantizers: int, folder: str) -> None:
    """Train process `rank` for twelve steps on its own vectors, with its own seed and batch size."""
    join(rank, port)
    torch.manual_seed(rank)
    module = ResidualQuantizer(8, 4, num_quantizers) if num_quantizers else VectorQuantizer(8, 4)
    module.train()
    for step in range(12):
        x = torch.randn(40 - 8 * rank, 4) + 5 * rank
        x[: 30 if step == 0 else 1] = float("nan")
        module(x)
    save_file(module.state_dict(), Path(folder, str(rank)))
    save_file({"usage": module.metrics()["perplexity"]}, Path(folder, f"usage{rank}"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_quantizers", [0, 2])
def test_vector_quantizer_two_processes_have_identical_codebooks(num_quantizers, tmp_path):
    torch.multiprocessing.spawn(train, args=(free_port(), num_quantizers, str(tmp_path)), nprocs=2)
    first, second = (load_file(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    codebook = first["layers.0.codebook" if num_quantizers else "codebook"]
    assert (codebook.mean(dim=1) < 2).any() and (codebook.mean(dim=1) > 3).any(), "the codebook covers the data of both"
    usages = [load_file(tmp_path / f"usage{rank}")["usage"] for rank in (0, 1)]
    assert torch.equal(*usages)


def train_by_halves(rank: int, port: int, folder: str) -> None:
    """Train process `rank` on its half of every batch."""
    join(rank, port)
    save_file(train_on(lambda batch: batch.chunk(2)[rank]).state_dict(), Path(folder, str(rank)))
    torch.distributed.destroy_process_group()


def train_on(share, *, replace_dead_codes: bool = True) -> VectorQuantizer:
    """Train for eight steps on a share of drifting batches, so that codes die.

    The last batch has fewer vectors than there are codes.
    """
    batches = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = VectorQuantizer(24, 4, replace_dead_codes=replace_dead_codes).train()
    module.init_from_data(torch.randn(100, 4, generator=batches))
    for step in range(8):
        module(share(torch.randn(20 if step == 7 else 80, 4, generator=batches) + step))
    return module


def test_dead_code_replacement_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(train_by_halves, args=(free_port(), str(tmp_path)), nprocs=2)
    whole, half = train_on(lambda batch: batch).state_dict(), load_file(tmp_path / "1")
    untouched = train_on(lambda batch: batch, replace_dead_codes=False).codebook
    assert (whole["codebook"] - untouched).abs().amax(dim=1).gt(0.1).sum() > 12, "half of the codes were replaced"
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, msg=name)
