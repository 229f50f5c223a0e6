"""When to look at what a tensor holds: a GPU has the CPU wait for each look, and in a compiled graph there is nothing to see yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

CHECKED: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def checked_before() -> Iterator[None]:
    """Within it, nobody checks what codes and pictures hold (their shapes and types, yes): they were checked, or are of our own making."""
    token = CHECKED.set(True)
    try:
        yield
    finally:
        CHECKED.reset(token)


def worth_checking(values: Tensor) -> bool:
    """Whether there is anything to check about values, and nobody has, and it can be seen."""
    return values.numel() > 0 and not torch.compiler.is_compiling() and not CHECKED.get()


def may_look_at(values: Tensor) -> bool:
    """Whether to ask what they are costs nothing: on a CPU, outside a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
