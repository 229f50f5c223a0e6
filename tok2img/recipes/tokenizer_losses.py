"""Wrap a VQ-VAE with the perceptual and adversarial losses of a recipe."""

from pathlib import Path

import torch

from tokenizers_vq import VQVAE, AdversarialLoss, PatchDiscriminator, PerceptualLoss, TokenizerWithLoss
from tokenizers_vq.loading import CONFIG_FILE
from tokenizers_vq.losses.reconstruction import PIXEL_LOSSES, ReconstructionLoss

from ..evaluation.caption_classifier import CaptionClassifier, FeatureMaps
from .config import TokenizerRecipe


def with_losses(recipe: TokenizerRecipe, tokenizer: VQVAE) -> VQVAE | TokenizerWithLoss:
    """Wrap a tokenizer with the recipe's losses. Without any, return it unchanged."""
    loss = PIXEL_LOSSES[tokenizer.config.reconstruction_loss]
    if recipe.perceptual_model:
        loss = perceptual_loss(recipe.perceptual_model, tokenizer, pixel_loss=loss)
    if recipe.disc_start:
        loss = adversarial_loss(recipe, tokenizer, loss)
    return TokenizerWithLoss(tokenizer, loss) if recipe.perceptual_model or recipe.disc_start else tokenizer


def perceptual_loss(folder: str, tokenizer: VQVAE, *, pixel_loss: ReconstructionLoss) -> PerceptualLoss:
    """Build a perceptual loss on the features of a saved caption classifier.

    Raises:
        ValueError: If the folder holds no classifier, or one for images with another number of channels.
    """
    if not Path(folder, CONFIG_FILE).is_file():
        raise ValueError(
            f"key 'perceptual_model': {folder} holds no classifier of captions; `tok2img evaluate --verifier FOLDER` leaves one"
        )
    classifier, config = CaptionClassifier.from_pretrained(folder), tokenizer.config
    if classifier.config.num_channels != config.num_channels:
        came, wanted = classifier.config.num_channels, config.num_channels
        raise ValueError(f"key 'perceptual_model': {folder} sees images of {came} channels, the tokenizer has {wanted}")
    return PerceptualLoss(
        FeatureMaps(classifier), pixel_loss=pixel_loss, pixel_mean=config.pixel_mean, pixel_std=config.pixel_std
    )


def adversarial_loss(recipe: TokenizerRecipe, tokenizer: VQVAE, loss: ReconstructionLoss) -> AdversarialLoss:
    """Add a patch discriminator of the tokenizer's images to a loss."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        discriminator = PatchDiscriminator(tokenizer.config.image_size, tokenizer.config.num_channels)
    return AdversarialLoss(
        discriminator,
        start_step=recipe.disc_start * recipe.gradient_accumulation_steps,  # it counts batches, not steps
        weight=recipe.disc_weight,
        reconstruction_loss=loss,
    )
