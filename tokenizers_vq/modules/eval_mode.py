"""A context manager that puts a module into eval mode."""

from typing import Self

from torch import nn


class eval_mode:  # noqa: N801 - lower case like `torch.no_grad`
    """Put a module and its submodules into eval mode for a `with` block.

    Args:
        module: The module. Its submodules may be in different modes.
    """

    def __init__(self, module: nn.Module):
        self.module, self.training = module, [each for each in module.modules() if each.training]

    def __enter__(self) -> Self:
        self.module.eval()
        return self

    def __exit__(self, *error: object) -> None:
        # Not `train()`, which would also switch on submodules that were in eval mode before.
        for each in self.training:
            each.training = True
