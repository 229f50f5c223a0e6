"""Run a block of code with a module in eval mode."""

from typing import Self

from torch import nn


class eval_mode:  # noqa: N801 - reads as the statement it is
    """Hold a module and all in it in eval mode for the length of a `with` block."""

    def __init__(self, module: nn.Module):
        self.module, self.training = module, [each for each in module.modules() if each.training]

    def __enter__(self) -> Self:
        self.module.eval()
        return self

    def __exit__(self, *error: object) -> None:
        for each in self.training:
            each.training = True
