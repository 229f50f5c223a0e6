"""Models as a trainer sees them: with what they learn from, of which nothing is left in the model that is saved."""

from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

LOSS_FILE = "loss.safetensors"


class ModelWithLoss(nn.Module):
    """A model, and beside it what it needs only while it learns.

    Attributes:
        kept: name of the attribute that holds the model, which alone is saved as a model.
    """

    kept: ClassVar[str]

    @property
    def inner(self) -> Any:
        """The model that is trained and saved."""
        return getattr(self, self.kept)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Save the model; and where a loss learns too, what it has learned, in a file of its own, for a run to be taken up again."""
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{self.kept}."
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        self.inner.save_pretrained(str(folder), state_dict=inner, **arguments)
        beside = {name: state[name].contiguous() for name in self._learned_beside()}
        if beside:
            Path(folder, LOSS_FILE).write_bytes(safetensors.torch.save(beside))

    def load_loss(self, folder: str | Path) -> None:
        """Put back what a loss had learned."""
        if self._learned_beside():
            self.load_state_dict(safetensors.torch.load_file(Path(folder, LOSS_FILE)), strict=False)

    def _learned_beside(self) -> list[str]:
        """Names of the tensors that change in training and are not the model's; what is frozen can be had again."""
        fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return [name for name in self.state_dict() if not name.startswith(f"{self.kept}.") and name not in fixed]


def get_inner_model(model: nn.Module) -> Any:
    """The model in a `ModelWithLoss`, or the model itself."""
    return model.inner if isinstance(model, ModelWithLoss) else model
