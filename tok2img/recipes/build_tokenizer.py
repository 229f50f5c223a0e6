"""Build the tokenizer that a recipe describes: from random weights, from a trained one, or as a student."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tokenizers_vq import (
    VQVAE,
    DiscreteTokenizer,
    Distillation,
    ModelWithLoss,
    TextSpanTokenizer,
    VQDrawForImages,
    VQDrawImageConfig,
    VQDrawStudent,
    VQDrawStudentConfig,
    VQVAEConfig,
)
from tokenizers_vq.auto import load_image_tokenizer
from tokenizers_vq.base import own_fields
from tokenizers_vq.text_base import UNKNOWN_BYTE

from ..data.images import load_images, load_pixels
from ..tokenization.span_text_tokenizer import TEXT_MODELS, load_text_model
from .config import TokenizerRecipe, require
from .tokenizer_losses import with_losses

IMAGE_MODELS = {"vqvae": (VQVAE, VQVAEConfig), "vqdraw": (VQDrawForImages, VQDrawImageConfig)}
TEXT_TOKENIZERS = (*TEXT_MODELS, "bpe")
MAX_TEXT_BYTES = 96
NUM_INSPECTED_IMAGES = 512  # read to infer sizes, channels, mean and deviation


def build_model(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer | ModelWithLoss:
    """Build the model that a recipe trains, wrapped with its teacher or its losses where it has any.

    Args:
        recipe: Recipe of the run.
        rows: Training examples, from which settings are inferred that the recipe leaves out.
    """
    if recipe.tokenizer == "vqdraw_student":
        return build_student(recipe)
    kinds = IMAGE_MODELS | TEXT_MODELS
    if recipe.tokenizer not in kinds:
        known = ", ".join([*IMAGE_MODELS, "vqdraw_student", *TEXT_TOKENIZERS])
        raise ValueError(f"tokenizer must be one of {known}, got {recipe.tokenizer!r}")
    if recipe.init_from:
        tokenizer = load_init_tokenizer(recipe, kinds[recipe.tokenizer][0])
    elif recipe.tokenizer in TEXT_MODELS:
        tokenizer = build_text_model(recipe, rows)
    else:
        tokenizer = build_image_tokenizer(recipe, rows)
    return with_losses(recipe, tokenizer) if isinstance(tokenizer, VQVAE) else tokenizer


def build_image_tokenizer(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer:
    """Build an image tokenizer with random weights; sizes, mean and deviation that are not set are measured."""
    model_class, config_class = IMAGE_MODELS[recipe.tokenizer]
    settings = infer_image_shape(rows) | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        tokenizer = model_class(config_class(**settings))
        if not {"pixel_mean", "pixel_std"} & settings.keys():
            pixels = load_pixels(rows[:NUM_INSPECTED_IMAGES]["image"], tokenizer)
            tokenizer.config.pixel_mean = round(pixels.mean().item(), 4)
            tokenizer.config.pixel_std = round(max(pixels.std().item(), 1e-3), 4)
    return tokenizer


def build_text_model(recipe: TokenizerRecipe, rows: Dataset) -> TextSpanTokenizer:
    """Build a text tokenizer with random weights; an alphabet and a length that are not set come from the captions."""
    model_class, config_class = TEXT_MODELS[recipe.tokenizer]
    texts = [caption.encode() for caption in rows["caption"]]
    settings: dict[str, Any] = {"alphabet": sorted({UNKNOWN_BYTE}.union(*texts))} | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if "max_length" not in settings:
            # A model of one span knows how texts are cut into spans.
            span = settings.get("span_length", config_class.span_length)
            smallest = model_class(config_class(**settings | {"max_length": span}))
            num_spans = max(sum(1 for _ in smallest.iter_chunks(text[:MAX_TEXT_BYTES])) for text in texts)
            settings["max_length"] = span * num_spans
        return model_class(config_class(**settings))


def build_student(recipe: TokenizerRecipe) -> Distillation:
    """Build a student of the recipe's settings, together with its teacher."""
    require(recipe, "teacher")
    teacher = load_vqdraw(recipe.teacher)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Distillation(VQDrawStudent(VQDrawStudentConfig.from_teacher(teacher, **recipe.model)), teacher)


def load_init_tokenizer(recipe: TokenizerRecipe, model_class: type[DiscreteTokenizer]) -> DiscreteTokenizer:
    """Load the tokenizer that a recipe fine-tunes, with the recipe's `model` settings in place of its own.

    Raises:
        ValueError: For a folder without a tokenizer of this class, and for settings that its weights do not fit.
    """
    path = recipe.init_from
    trained = load_text_model(path) if recipe.tokenizer in TEXT_MODELS else load_trained(path)
    if not isinstance(trained, model_class):
        raise ValueError(f"key 'init_from': {path} holds a {type(trained).__name__}, not a {model_class.__name__}")
    config: Any = trained.config
    settings = {name: getattr(config, name) for name in own_fields(type(config))}
    model = model_class(type(config)(**settings | recipe.model))
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise ValueError(f"key 'init_from': {path} does not fit the settings of 'model': {reason} ...") from error
    return model


def load_trained(path: str) -> DiscreteTokenizer:
    """Load a saved image tokenizer (a folder), or a checkpoint of VQ-DRAW's original code (a file)."""
    return VQDrawForImages.from_vq_draw_checkpoint(path) if Path(path).is_file() else load_image_tokenizer(path)


def load_vqdraw(path: str) -> VQDrawForImages:
    """Load a VQ-DRAW model as `load_trained` does; any other tokenizer is a ValueError."""
    model = load_trained(path)
    if not isinstance(model, VQDrawForImages):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a VQ-DRAW model")
    return model


def infer_image_shape(rows: Dataset) -> dict[str, Any]:
    """Infer `image_size` and `num_channels` from the first images.

    The size is the shortest side, rounded down to a multiple of 4. There is one channel if all images are gray.
    """
    images = load_images(rows[:NUM_INSPECTED_IMAGES]["image"])
    side = min(min(image.size) for image in images)
    is_gray = True
    for image in images:
        red, green, blue = (channel.tobytes() for channel in image.split())
        is_gray = is_gray and red == green == blue
    return {"image_size": max(4, side // 4 * 4), "num_channels": 1 if is_gray else 3}
