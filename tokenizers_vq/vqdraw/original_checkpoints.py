"""Read checkpoints of VQ-DRAW's original code."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..loading import first_line
from .original_refiners import PRESETS, OriginalRefiner, state_channels
from .pt_to_safetensors import read_pt

BUFFERS = {"_stages", "_grad_decay"}  # of one number each


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a `.pt` file of tensors alone. ValueError for any other file."""
    if Path(path).suffix != ".safetensors":
        return read_pt(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read tensors from {path}: {first_line(error)}") from error


def convert_state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under the names that `VQDraw` has for its tensors; its two buffers stay out."""
    layers = [name.partition(".layers.")[2].split(".")[0] for name in tensors if ".layers." in name]
    head = f".layers.{max(map(int, filter(str.isdecimal, layers)), default=-1)}."
    renamed = {"biases": biases_of(tensors)[None]} if "bias" in tensors else {}
    for name, tensor in tensors.items():
        if name.startswith("refiner."):
            name = name.replace(".segments.", ".refiners.").replace(".embeddings", ".gain")
            renamed[name.replace(f"{head}module_list.", ".heads.").replace(head, ".heads.0.")] = tensor
    return renamed


def is_gaussian(tensors: dict[str, Tensor]) -> bool:
    """Whether a published state dict draws a mean and a deviation of each pixel: they are the last axis of its biases."""
    return "bias" in tensors and tensors["bias"].ndim == 5 and tensors["bias"].shape[-1] == 2


def biases_of(tensors: dict[str, Tensor]) -> Tensor:
    """The biases `k c h w` of a published state dict, or what stands for them there; means, then deviations, are channels of ours."""
    bias = tensors.get("bias", torch.zeros(0))
    return rearrange(bias, "k c h w s -> k (s c) h w") if is_gaussian(tensors) else bias


def segment_sizes(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """How many refiners a published state dict holds, and the stages of each; 0 where it holds none."""
    segments = {name.split(".")[2] for name in tensors if name.startswith("refiner.segments.")}
    gains = [tensor for name, tensor in tensors.items() if name.endswith(".embeddings")]
    return max(1, len(segments)), len(gains[0]) if gains else 0


def infer_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of `VQDrawImageConfig` for a published state dict, read off its tensors.

    Raises:
        ValueError: for tensors that no published architecture has.
    """
    bias, gaussian = biases_of(tensors), is_gaussian(tensors)
    num_refiners, length = segment_sizes(tensors)
    ours = {name: tensor.shape for name, tensor in convert_state_dict(tensors).items() if name != "biases"}
    whole = bias.ndim == 4 and bias.shape[2] == bias.shape[3] and length
    if whole and all(tensors[name].numel() == 1 for name in BUFFERS & tensors.keys()):
        for name, preset in PRESETS.items():
            shapes = expected_shapes(name, len(bias), length, num_refiners, gaussian=gaussian)
            if bias.shape[1] == state_channels(name, gaussian=gaussian) and ours == shapes:
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
        f"no published architecture ({', '.join(PRESETS)}) has these {len(tensors)} tensors; "
        f"bias is {tuple(bias.shape)}, {num_refiners} refiners of {length} stages"
    )


def expected_shapes(
    name: str, codebook_size: int, num_stages: int, num_refiners: int, *, gaussian: bool
) -> dict[str, torch.Size]:
    """Shapes of the tensors of all refiners of an architecture, by their names in `VQDraw`."""
    with torch.device("meta"):
        refiner = OriginalRefiner(name, num_stages=num_stages, codebook_size=codebook_size, gaussian=gaussian)
    prefixes = ["refiner."] if num_refiners == 1 else [f"refiner.refiners.{index}." for index in range(num_refiners)]
    return {prefix + key: tensor.shape for prefix in prefixes for key, tensor in refiner.state_dict().items()}
