"""Turns a `.pt` file of tensors into safetensors, in a process of its own that ends when it is done.

Run as a program: `python pt_checkpoint.py IN.pt OUT.safetensors`. Nothing else here opens a pickle, and this opens weights only.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def read_pt(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file; ValueError, in one line, for a file that holds anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "tensors.safetensors")
        done = subprocess.run([sys.executable, __file__, str(path), str(copy)], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "the reader died").splitlines()[-1]
            raise ValueError(f"{path} is no file of tensors alone: {reason}")
        return {name: tensor.clone() for name, tensor in load_file(copy).items()}


def convert(source: str, target: str) -> None:
    """Write the tensors of one file into the other."""
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whose text may advise to run what the file holds
        raise ValueError("torch.save did not write it, or wrote more into it than tensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    save_file({str(name): tensor.contiguous().clone() for name, tensor in tensors.items()}, target)


if __name__ == "__main__":
    try:
        convert(*sys.argv[1:])
    except Exception as error:  # whatever is in the file, its reader says one line
        sys.exit(" ".join(str(error).split())[:300] or type(error).__name__)
