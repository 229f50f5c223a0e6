"""Moves models to the accelerator."""

import os
from typing import Any, TypeVar

import torch

Movable = TypeVar("Movable", bound=Any)


def to_device(model: Movable) -> Movable:
    """Move a model to the accelerator, if there is one; under torchrun to the one of `LOCAL_RANK`."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return model
    own = os.environ.get("LOCAL_RANK")
    return model.to(device if own is None else torch.device(device.type, int(own)))
