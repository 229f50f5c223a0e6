"""Convert checkpoints of the original VQ-DRAW code (github.com/unixpickle/vq-draw)."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..loading import first_line
from .original_refiners import PRESETS, OriginalRefiner, state_channels
from .pt_to_safetensors import load_pt

SCALAR_BUFFERS = {"_stages", "_grad_decay"}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint by name.

    Args:
        path: A safetensors file, or a `.pt` file that holds only tensors.

    Raises:
        ValueError: For any other file.
    """
    if Path(path).suffix != ".safetensors":
        return load_pt(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read tensors from {path}: {first_line(error)}") from error


def convert_state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an original state dict to those of `VQDraw`. Its two buffers are left out."""
    # The last layer of an original stack is our head: one layer, or a `module_list` with one a stage.
    layers = [name.partition(".layers.")[2].split(".")[0] for name in tensors if ".layers." in name]
    head = f".layers.{max(map(int, filter(str.isdecimal, layers)), default=-1)}."
    renamed = {"biases": convert_biases(tensors)[None]} if "bias" in tensors else {}
    for name, tensor in tensors.items():
        if name.startswith("refiner."):
            name = name.replace(".segments.", ".refiners.").replace(".embeddings", ".gain")
            renamed[name.replace(f"{head}module_list.", ".heads.").replace(head, ".heads.0.")] = tensor
    return renamed


def has_gaussian_loss(tensors: dict[str, Tensor]) -> bool:
    """Return True if the biases have a last axis of two, mean and log standard deviation."""
    return "bias" in tensors and tensors["bias"].ndim == 5 and tensors["bias"].shape[-1] == 2


def convert_biases(tensors: dict[str, Tensor]) -> Tensor:
    """Return the biases of an original state dict as `k c h w`, or an empty tensor if it has none.

    With a Gaussian loss the original has `k c h w 2`. Here means, then deviations, are channels.
    """
    bias = tensors.get("bias", torch.zeros(0))
    return rearrange(bias, "k c h w s -> k (s c) h w") if has_gaussian_loss(tensors) else bias


def infer_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Infer the settings of `VQDrawImageConfig` from the tensors of an original state dict.

    Args:
        tensors: Tensors by their original names.

    Returns:
        Settings by name.

    Raises:
        ValueError: If no architecture of the paper has these tensors.
    """
    bias, gaussian = convert_biases(tensors), has_gaussian_loss(tensors)
    # A checkpoint without segments has one refiner. Without stage embeddings the length is 0, which
    # fits no architecture.
    segments = {name.split(".")[2] for name in tensors if name.startswith("refiner.segments.")}
    num_refiners = max(1, len(segments))
    length = next((len(tensor) for name, tensor in tensors.items() if name.endswith(".embeddings")), 0)
    prefixes = ["refiner."] if num_refiners == 1 else [f"refiner.refiners.{index}." for index in range(num_refiners)]
    shapes = {name: tensor.shape for name, tensor in convert_state_dict(tensors).items() if name != "biases"}
    is_plausible = bias.ndim == 4 and bias.shape[2] == bias.shape[3] and length
    if is_plausible and all(tensors[name].numel() == 1 for name in SCALAR_BUFFERS & tensors.keys()):
        for name, preset in PRESETS.items():
            with torch.device("meta"):  # only the shapes are needed
                refiner = OriginalRefiner(name, num_stages=length, codebook_size=len(bias), gaussian=gaussian)
            state_dict = refiner.state_dict()
            expected = {prefix + key: tensor.shape for prefix in prefixes for key, tensor in state_dict.items()}
            if bias.shape[1] == state_channels(name, gaussian=gaussian) and shapes == expected:
                return preset | {
                    "refiner": name,
                    "stage_loss": "gaussian_nll" if gaussian else "mse",
                    "checkpoint_stages": False,
                    "image_size": bias.shape[-1],
                    "codebook_size": len(bias),
                    "num_stages": num_refiners * length,
                    "active_stages": int(tensors.get("_stages", torch.tensor(0))),
                    "segment_length": length if num_refiners > 1 else 0,
                    "grad_decay": float(tensors.get("_grad_decay", torch.tensor(0.0))),
                }
    raise ValueError(
        f"Expected the tensors of an original architecture ({', '.join(PRESETS)}), got {len(tensors)} tensors "
        f"that fit none: bias is {tuple(bias.shape)}, {num_refiners} refiners of {length} stages."
    )
