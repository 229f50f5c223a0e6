"""Converts a `.pt` file of tensors to safetensors in a process of its own.

Run as a program: `python pt_to_safetensors.py IN.pt OUT.safetensors`. This is the only file that
unpickles. `weights_only=True` refuses everything but tensors, and the separate process contains
crashes and memory of a hostile file.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_pt(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a `.pt` file by name.

    Args:
        path: File that `torch.save` wrote.

    Returns:
        Tensors by name.

    Raises:
        ValueError: If the file does not exist or holds anything but tensors; the message is one line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "tensors.safetensors")
        process = subprocess.run([sys.executable, __file__, str(path), str(converted)], capture_output=True, text=True)
        if process.returncode:
            reason = (process.stderr.strip() or "the converter crashed").splitlines()[-1]
            raise ValueError(f"Expected {path} to hold tensors only: {reason}")
        # Cloned, because `load_file` maps the file, which is deleted here.
        return {name: tensor.clone() for name, tensor in load_file(converted).items()}


def convert(source: str, target: str) -> None:
    """Convert the `.pt` file `source` to the safetensors file `target`."""
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # not its own message: that may advise to unpickle without a check
        raise ValueError("torch.save did not write it, or it holds more than tensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError(f"got a {type(tensors).__name__} instead of a dict of tensors")
    save_file({str(name): tensor.contiguous().clone() for name, tensor in tensors.items()}, target)


if __name__ == "__main__":
    try:
        convert(*sys.argv[1:])
    except Exception as error:  # any failure becomes one line for `load_pt`
        sys.exit(" ".join(str(error).split())[:300] or type(error).__name__)
