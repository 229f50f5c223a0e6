"""Two processes that train one codebook, each on data of its own."""

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


def train(rank: int, port: int, num_levels: int, folder: str) -> None:
    """Twelve steps of process `rank`: unlike vectors, unequal numbers of them, and other random numbers."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(rank)
    module = ResidualQuantizer(8, 4, num_levels) if num_levels else VectorQuantizer(8, 4)
    module.train()
    for step in range(12):
        x = torch.randn(40 - 8 * rank, 4) + 5 * rank
        x[: 30 if step == 0 else 1] = float("nan")
        module(x)
    save_file(module.state_dict(), Path(folder, str(rank)))
    save_file({"usage": module.metrics()["perplexity"]}, Path(folder, f"usage{rank}"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_levels", [0, 2])
def test_codebooks_of_two_processes_are_the_same_to_the_last_bit(num_levels, tmp_path):
    torch.multiprocessing.spawn(train, args=(free_port(), num_levels, str(tmp_path)), nprocs=2)
    first, second = (load_file(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    codebook = first["levels.0.codebook" if num_levels else "codebook"]
    assert (codebook.mean(dim=1) < 2).any() and (codebook.mean(dim=1) > 3).any(), "it serves the data of both"
    usages = [load_file(tmp_path / f"usage{rank}")["usage"] for rank in (0, 1)]
    assert torch.equal(*usages)
