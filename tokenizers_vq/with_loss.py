"""Models as a trainer sees them: with what they learn from, of which nothing is left in the model that is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

from .base import TokenizerOutput
from .reconstruction import ReconstructionLoss, parts_of
from .vqvae import VQVAE

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


class TokenizerWithLoss(ModelWithLoss):
    """A VQ-VAE that learns from another reconstruction loss than its config's: pictures in, loss out.

    Args:
        tokenizer: the model that learns.
        reconstruction_loss: of normalised pictures; one that learns itself, such as `AdversarialLoss`, does so with the same optimizer.
    """

    kept = "tokenizer"

    def __init__(self, tokenizer: VQVAE, reconstruction_loss: ReconstructionLoss):
        super().__init__()
        self.tokenizer, self.reconstruction_loss = tokenizer, reconstruction_loss

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> the tokenizer's output with this loss, its parts among the metrics."""
        output = self.tokenizer(pixel_values, self.reconstruction_loss)
        return replace(output, metrics={**output.metrics, **parts_of(self.reconstruction_loss)})


def inner_of(model: nn.Module) -> Any:
    """The model in a `ModelWithLoss`, or the model itself."""
    return model.inner if isinstance(model, ModelWithLoss) else model
