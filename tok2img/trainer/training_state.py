"""What a run needs beside its weights to go on exactly: optimizer, learning rate, counts and random numbers, as safetensors and JSON.

Nothing is ever unpickled.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenizers_vq.distributed import get_rank

SETTINGS = "settings"  # key of the JSON in the head of a safetensors file


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state; what processes hold in parts is put together on the first one's CPU, and all have to take part in that."""
    state = optimizer.state_dict()
    entries = {
        number: {name: whole(value) for name, value in entry.items()} for number, entry in state["state"].items()
    }
    return state | {"state": entries}


def whole(value: Any) -> Any:
    """A value as it is, or a tensor of which this process has a part as all of it: in the first process, others get none of it."""
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if get_rank() == 0 else None


def part_of(value: Any, parameter: Tensor) -> Any:
    """A whole tensor as this process holds its parameter: the part of it where it has a part of that."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def save_optimizer(file: Path, state: Mapping[str, Any]) -> None:
    """Write an optimizer's whole state and the settings of its groups."""
    values = {(number, name): value for number, entry in state["state"].items() for name, value in entry.items()}
    tensors = {f"{number}.{name}": value for (number, name), value in values.items() if isinstance(value, Tensor)}
    plain = [[*key, value] for key, value in values.items() if not isinstance(value, Tensor)]
    save_tensors(file, tensors, {"param_groups": state["param_groups"], "plain": plain})


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `save_optimizer` wrote; ValueError where it belongs to other weights."""
    tensors, settings = load_tensors(file)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in sorted(tensors.items()):  # in the same order in all processes, which share it out together
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = part_of(tensor, parameters[int(number)])
    for number, name, value in settings["plain"]:
        state.setdefault(number, {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in settings["param_groups"]]:
        raise ValueError(f"{file} is the optimizer of another model")
    # JSON has no tuples, which an optimizer may insist on.
    restored = [
        now | {name: tuple(value) if isinstance(now.get(name), tuple) else value for name, value in then.items()}
        for now, then in zip(groups, settings["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": restored})


def save_unsaved_buffers(file: Path, model: nn.Module) -> None:
    """Write the buffers that are no part of a saved model, such as counts of what was of use lately, as this process has them."""
    saved = model.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}
    save_tensors(file, buffers, {})


def load_unsaved_buffers(file: Path, model: nn.Module) -> None:
    """Put back what `save_unsaved_buffers` wrote, whatever length it has by now."""
    for name, saved in load_tensors(file)[0].items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own_name, saved.to(getattr(module, own_name).device))


def save_random_state(file: Path) -> None:
    """Write the state of every random number generator of this process: Python's, NumPy's, torch's on CPU and accelerators."""
    version, internal, next_gauss = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    settings = {"python": [version, next_gauss], "numpy": [name, int(position), int(has_gauss), float(gauss)]}
    save_tensors(file, tensors, settings)


def load_random_state(file: Path) -> None:
    """Put back what `save_random_state` wrote."""
    tensors, settings = load_tensors(file)
    version, next_gauss = settings["python"]
    name, position, has_gauss, gauss = settings["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def save_tensors(file: Path, tensors: Mapping[str, Tensor], settings: Any) -> None:
    """Tensors with JSON in the file's head; every number comes back as it was."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, file, metadata={SETTINGS: json.dumps(settings)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_tensors` wrote."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        return tensors, json.loads(opened.metadata()[SETTINGS])
