"""Goes on from a tokenizer that is trained already: on other data, at another rate, or from a checkpoint of VQ-DRAW's own code."""

from pathlib import Path
from typing import Any

from tokenizers_vq import DiscreteTokenizer, VQDrawForImages
from tokenizers_vq.auto import load_image_tokenizer
from tokenizers_vq.base import own_fields

from ..tokenization.span_text_tokenizer import TEXT_MODELS, load_text_model
from .config import TokenizerRecipe


def load_trained(path: str) -> DiscreteTokenizer:
    """A saved image tokenizer, or a checkpoint of VQ-DRAW's own code; ValueError for anything else."""
    return VQDrawForImages.from_vq_draw_checkpoint(path) if Path(path).is_file() else load_image_tokenizer(path)


def load_vqdraw(path: str) -> VQDrawForImages:
    """The same, if it is a VQ-DRAW model; ValueError for any other."""
    model = load_trained(path)
    if not isinstance(model, VQDrawForImages):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a VQ-DRAW model")
    return model


def load_start(recipe: TokenizerRecipe, kind: type[DiscreteTokenizer]) -> DiscreteTokenizer:
    """The tokenizer that a recipe goes on from, with the recipe's settings of the model in place of its own.

    Raises:
        ValueError: for a folder that holds no tokenizer, or one of another kind, and for settings that its weights do not fit.
    """
    path = recipe.init_from
    before = load_text_model(path) if recipe.tokenizer in TEXT_MODELS else load_trained(path)
    if not isinstance(before, kind):
        raise ValueError(f"key 'init_from': {path} holds a {type(before).__name__}, not a {kind.__name__}")
    config: Any = before.config
    settings = {name: getattr(config, name) for name in own_fields(type(config))}
    model = kind(type(config)(**settings | recipe.model))
    try:
        model.load_state_dict(before.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise ValueError(f"key 'init_from': {path} does not fit the settings of 'model': {reason} ...") from error
    return model
