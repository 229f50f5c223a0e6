"""Build the prior of a run with its loss, and turn the trained one into a plain model again."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..prior.codebook_init import get_codebooks, init_from_codebook
from ..prior.float32_attention import attend_in_float32
from ..prior.from_language_model import extend_prior
from ..prior.lora import LoraPriorWithLoss, add_lora
from ..prior.loss import PriorWithLoss
from ..prior.model import build_prior, load_prior
from ..prior.position_embeddings import AxialPositionEmbeddings, build_position_embeddings, with_position_specific_ids
from ..tokenization.processor import Tok2ImgProcessor
from .config import PriorRecipe


def init_prior(recipe: PriorRecipe, processor: Tok2ImgProcessor) -> PreTrainedModel:
    """Return the prior at the start of training: trained, extended from a language model, or with random weights."""
    layout = processor.layout
    codebooks = get_codebooks(processor.image_tokenizer) if recipe.init_from_codebook else None
    if recipe.init_from:
        prior = load_prior(recipe.init_from, layout)
    elif recipe.base_model:
        prior = extend_prior(recipe.base_model, layout, seed=recipe.seed)
    else:
        prior = build_prior(
            layout, architecture=recipe.architecture, depth=recipe.depth, dropout=recipe.dropout, seed=recipe.seed
        )
    if codebooks is not None:
        init_from_codebook(prior, layout, codebooks, seed=recipe.seed)
    if recipe.bf16 and not torch.accelerator.is_available():
        attend_in_float32(prior)  # bf16 attention is slow backwards on a CPU
    return prior


def build_prior_with_loss(recipe: PriorRecipe, processor: Tok2ImgProcessor) -> tuple[PriorWithLoss, Any]:
    """Build what the trainer trains: the prior, adapted by LoRA if the recipe says so, with its loss.

    Returns:
        The prior with its loss, and the LoRA adapter for `merge_lora` (None without LoRA).
    """
    prior = init_prior(recipe, processor)
    layout = processor.layout
    adapter = add_lora(prior, layout, rank=recipe.lora_rank, seed=recipe.seed) if recipe.lora_rank else None
    model_class = LoraPriorWithLoss if recipe.lora_rank else PriorWithLoss
    model = model_class(
        prior,
        layout,
        caption_dropout=recipe.caption_dropout,
        image_loss_weight=recipe.image_loss_weight,
        image_to_text_fraction=recipe.image_to_text_fraction,
        position_embeddings=build_position_embeddings(prior, layout) if recipe.axial_position_embeddings else None,
        compile=recipe.torch_compile,
    )
    return model, adapter


def export_prior(
    prior: PreTrainedModel, processor: Tok2ImgProcessor, position_embeddings: AxialPositionEmbeddings | None
) -> tuple[PreTrainedModel, Tok2ImgProcessor]:
    """Return a plain prior and its processor that generate what was trained.

    Position embeddings are folded into the token embeddings of a copy whose codes have ids of their own at
    every position. Without them, both are returned as they are.
    """
    if position_embeddings is None:
        return prior, processor
    layout = processor.layout
    exported = with_position_specific_ids(prior, layout, position_embeddings)
    return exported, processor.with_layout(layout.with_position_specific_ids())
