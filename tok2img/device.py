"""Move models to the accelerator where there is one."""

import os
from typing import Any, TypeVar

import torch

Movable = TypeVar("Movable", bound=Any)


def to_device(model: Movable) -> Movable:
    """Onto the accelerator, where there is one; each of the processes that torchrun starts has its own."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return model
    own = os.environ.get("LOCAL_RANK")
    return model.to(device if own is None else torch.device(device.type, int(own)))
