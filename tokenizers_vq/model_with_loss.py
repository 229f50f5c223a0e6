"""Wrap a model with its training loss. Only the inner model is saved as a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

LOSS_FILE = "loss.safetensors"


class ModelWithLoss(nn.Module):
    """Base class of wrappers around a model and what only its training needs.

    An example of the latter is a discriminator.

    Subclasses set `inner_name`, assign the model to that attribute, and return the loss from
    `forward`. To a trainer the wrapper is one module, so DDP, FSDP and the optimizer see the
    parameters of the loss as well.

    Attributes:
        inner_name: Name of the attribute that holds the model.

    Example:
        >>> from torch import nn
        >>> from tokenizers_vq import ModelWithLoss
        >>> class WithPenalty(ModelWithLoss):
        ...     inner_name = "model"
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...     def forward(self, x):
        ...         return self.model(x).square().mean()
        >>> WithPenalty(nn.Linear(2, 1)).inner
        Linear(in_features=2, out_features=1, bias=True)
    """

    inner_name: ClassVar[str]

    @property
    def inner(self) -> Any:
        """The model that is trained and saved."""
        return getattr(self, self.inner_name)

    def prepare_step(self, batches: list[dict[str, Any]], uniform: Callable[..., Tensor]) -> list[dict[str, Any]]:
        """Prepare the batches of one training step. The trainer calls this before their forward passes.

        The default returns them unchanged. A loss overrides it for whatever all batches of a step decide together.

        Args:
            batches: The batches of this process.
            uniform: Returns random numbers in [0, 1) of a shape, the same in all processes.
        """
        del uniform
        return batches

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Save the inner model, and a trainable loss to a file of its own for resuming.

        Args:
            folder: Folder to write to.
            state_dict: State of the whole wrapper, if it is not `self.state_dict()`, e.g. gathered
                from FSDP shards.
            arguments: Further arguments of the model's `save_pretrained`.
        """
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{self.inner_name}."
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        self.inner.save_pretrained(str(folder), state_dict=inner, **arguments)
        loss_state = {name: state[name].contiguous() for name in self._loss_state_names()}
        if loss_state:
            Path(folder, LOSS_FILE).write_bytes(safetensors.torch.save(loss_state))

    def load_loss(self, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote of a trainable loss; does nothing for other losses."""
        if self._loss_state_names():
            # Not strict: the inner model and frozen parts are missing from this file.
            self.load_state_dict(safetensors.torch.load_file(Path(folder, LOSS_FILE)), strict=False)

    def _loss_state_names(self) -> list[str]:
        """Return names of the loss's tensors that training changes.

        Frozen tensors, such as those of a feature network, are loaded from elsewhere.
        """
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        prefix = f"{self.inner_name}."
        return [name for name in self.state_dict() if not name.startswith(prefix) and name not in frozen]


def get_inner_model(model: nn.Module) -> Any:
    """Return the model inside a `ModelWithLoss`, or the model itself if it is not wrapped."""
    return model.inner if isinstance(model, ModelWithLoss) else model
