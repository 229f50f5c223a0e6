"""Train a VQ-VAE with perceptual and adversarial losses."""

from dataclasses import replace

from torch import Tensor

from ..base import TokenizerOutput
from ..losses.reconstruction import ReconstructionLoss, loss_terms
from ..model_with_loss import ModelWithLoss
from .image_tokenizer import VQVAE


class TokenizerWithLoss(ModelWithLoss):
    """A VQ-VAE that learns from another reconstruction loss than its config's: images in, loss out.

    Args:
        tokenizer: the model that learns.
        reconstruction_loss: of normalised images; one that learns itself, such as `AdversarialLoss`, does so with the same optimizer.
    """

    inner_name = "tokenizer"

    def __init__(self, tokenizer: VQVAE, reconstruction_loss: ReconstructionLoss):
        super().__init__()
        self.tokenizer, self.reconstruction_loss = tokenizer, reconstruction_loss

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """`b c h w` in [0, 1] -> the tokenizer's output with this loss, its parts among the metrics."""
        output = self.tokenizer(pixel_values, self.reconstruction_loss)
        return replace(output, metrics={**output.metrics, **loss_terms(self.reconstruction_loss)})
