"""The losses that a recipe asks for, built around the tokenizer that learns from them."""

from pathlib import Path

import torch

from tokenizers_vq import VQVAE, AdversarialLoss, PatchDiscriminator, PerceptualLoss, TokenizerWithLoss
from tokenizers_vq.loading import CONFIG_FILE
from tokenizers_vq.losses.reconstruction import PIXEL_LOSSES, ReconstructionLoss

from ..evaluation.caption_classifier import CaptionClassifier, FeatureMaps
from .config import TokenizerRecipe


def with_losses(recipe: TokenizerRecipe, tokenizer: VQVAE) -> VQVAE | TokenizerWithLoss:
    """A tokenizer with the recipe's losses beside it; as it is where the recipe asks for no more than its own."""
    loss = PIXEL_LOSSES[tokenizer.config.reconstruction_loss]
    if recipe.perceptual_model:
        loss = perceptual_loss(recipe.perceptual_model, tokenizer, pixel_loss=loss)
    if recipe.disc_start:
        loss = adversarial_loss(recipe, tokenizer, loss)
    return TokenizerWithLoss(tokenizer, loss) if recipe.perceptual_model or recipe.disc_start else tokenizer


def perceptual_loss(folder: str, tokenizer: VQVAE, *, pixel_loss: ReconstructionLoss) -> PerceptualLoss:
    """Of the features of a saved classifier of captions; ValueError for none, and for one of other images."""
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
    """A discriminator of the tokenizer's images on top of a loss."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        discriminator = PatchDiscriminator(tokenizer.config.image_size, tokenizer.config.num_channels)
    return AdversarialLoss(
        discriminator,
        start_step=recipe.disc_start * recipe.gradient_accumulation_steps,  # which it counts in batches
        weight=recipe.disc_weight,
        reconstruction_loss=loss,
    )
