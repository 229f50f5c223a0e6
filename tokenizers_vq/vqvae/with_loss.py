"""Trains a VQ-VAE with perceptual and adversarial losses."""

from dataclasses import replace

from torch import Tensor

from ..base import TokenizerOutput
from ..losses.reconstruction import ReconstructionLoss, loss_terms
from ..model_with_loss import ModelWithLoss
from .image_tokenizer import VQVAE


class TokenizerWithLoss(ModelWithLoss):
    """VQ-VAE with another reconstruction loss than its config's; saves the VQ-VAE alone.

    Args:
        tokenizer: The model to train.
        reconstruction_loss: Loss of normalized images. The parameters of a loss that learns, such
            as `AdversarialLoss`, belong to the same optimizer.

    Example:
        >>> import torch
        >>> from tokenizers_vq import PerceptualLoss, VQVAEConfig
        >>> tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=0))
        >>> features = torch.nn.Conv2d(3, 4, 3)  # in practice, a pretrained network
        >>> model = TokenizerWithLoss(tokenizer, PerceptualLoss(features))
        >>> output = model(torch.rand(2, 3, 8, 8))
        >>> sorted(output.metrics)
        ['code_usage', 'mse', 'perceptual_loss', 'perplexity', 'pixel_loss']
    """

    inner_name = "tokenizer"

    def __init__(self, tokenizer: VQVAE, reconstruction_loss: ReconstructionLoss):
        super().__init__()
        self.tokenizer, self.reconstruction_loss = tokenizer, reconstruction_loss

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Reconstruct images `b c h w` in [0, 1]; the metrics include the terms of the loss."""
        output = self.tokenizer(pixel_values, self.reconstruction_loss)
        return replace(output, metrics={**output.metrics, **loss_terms(self.reconstruction_loss)})
