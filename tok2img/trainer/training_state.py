"""Save and load what a run needs next to its weights to resume exactly.

These are the optimizer's state, the buffers that a saved model leaves out, and the states of all random
number generators. Everything is safetensors and JSON: nothing is ever unpickled.
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

METADATA_KEY = "settings"  # of the JSON in the header of a safetensors file


def save_optimizer(file: Path, model: nn.Module, optimizer: Any, *, write: bool = True) -> None:
    """Write the whole state of an optimizer. All processes that share the weights have to call this.

    Args:
        file: File to write.
        model: Model whose parameters the optimizer trains. The state is stored under their names.
        optimizer: Optimizer, or accelerate's wrapper of one.
        write: Write the file. True in the first process only.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = dict(
        get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=options)
    )
    if not write:
        return
    tensors: dict[str, Tensor] = {}
    plain: list[list[Any]] = []
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}/{name}"] = value
            else:
                plain.append([parameter, name, value])
    save_tensors(file, tensors, {"param_groups": state["param_groups"], "plain": plain})


def load_optimizer(file: Path, model: nn.Module, optimizer: Any) -> None:
    """Load what `save_optimizer` wrote, with any number of processes.

    Args:
        file: File to read.
        model: Model whose parameters the optimizer trains.
        optimizer: Optimizer, or accelerate's wrapper of one.

    Raises:
        ValueError: If the file belongs to the optimizer of another model.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    tensors, settings = load_tensors(file)
    state: dict[str, Any] = {}
    for key, tensor in tensors.items():
        parameter, _, name = key.rpartition("/")
        state.setdefault(parameter, {})[name] = tensor
    for parameter, name, value in settings["plain"]:
        state.setdefault(parameter, {})[name] = value
    now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    saved = settings["param_groups"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    if [group["params"] for group in saved] != [
        [names[each] for each in group["params"]] for group in optimizer.param_groups
    ]:
        raise ValueError(f"{file} belongs to the optimizer of another model.")
    options = StateDictOptions(full_state_dict=True)
    restored_state: Any = {"state": state, "param_groups": saved}
    set_optimizer_state_dict(model, optimizer, restored_state, options=options)
    for group, before, then in zip(optimizer.param_groups, now, saved, strict=True):
        for name, value in before.items():
            # torch skips groups without parameters, and JSON turns tuples into lists.
            restored = then.get(name, value)
            group[name] = tuple(restored) if isinstance(value, tuple) else restored


def save_unsaved_buffers(file: Path, model: nn.Module) -> None:
    """Write this process's buffers that a saved model leaves out, such as counts of recently used codes."""
    saved = model.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}
    save_tensors(file, buffers, {})


def load_unsaved_buffers(file: Path, model: nn.Module) -> None:
    """Load what `save_unsaved_buffers` wrote. A buffer may have another length by now."""
    for name, saved in load_tensors(file)[0].items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own_name, saved.to(getattr(module, own_name).device))


def save_random_state(file: Path) -> None:
    """Write the state of every random number generator of this process: Python's, NumPy's and torch's."""
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
    """Load what `save_random_state` wrote."""
    tensors, settings = load_tensors(file)
    version, next_gauss = settings["python"]
    name, position, has_gauss, gauss = settings["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def save_tensors(file: Path, tensors: Mapping[str, Tensor], settings: Any) -> None:
    """Write tensors, with `settings` as JSON in the file's header. Every number is restored exactly."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={METADATA_KEY: json.dumps(settings)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Read the tensors and settings that `save_tensors` wrote."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(opened.metadata()[METADATA_KEY])
