"""Build the tokenizer that a recipe describes."""

from typing import Any

import torch
from datasets import Dataset
from PIL import Image

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
from tokenizers_vq.text_base import UNKNOWN_BYTE

from ..data.images import load_images, load_pixels
from ..tokenization.span_text_tokenizer import TEXT_MODELS
from .config import TokenizerRecipe, require
from .init_from import load_start, load_vqdraw
from .tokenizer_losses import with_losses

MODELS = {"vqvae": (VQVAE, VQVAEConfig), "vqdraw": (VQDrawForImages, VQDrawImageConfig)}
TEXT_TOKENIZERS = (*TEXT_MODELS, "bpe")
MAX_TEXT_BYTES = 96
IMAGES_LOOKED_AT = 512


def build_model(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer | ModelWithLoss:
    """What is to be trained on the rows; a student with its teacher beside it, a VQ-VAE with its losses."""
    if recipe.tokenizer == "vqdraw_student":
        return build_student(recipe)
    if recipe.init_from:
        tokenizer = load_start(recipe, tokenizer_classes(recipe)[0])
    elif recipe.tokenizer in TEXT_MODELS:
        tokenizer = build_text_model(recipe, rows)
    else:
        tokenizer = build_tokenizer(recipe, rows)
    return with_losses(recipe, tokenizer) if isinstance(tokenizer, VQVAE) else tokenizer


def build_student(recipe: TokenizerRecipe) -> Distillation:
    """A student of the recipe's settings and its teacher."""
    require(recipe, "teacher")
    teacher = load_vqdraw(recipe.teacher)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Distillation(VQDrawStudent(VQDrawStudentConfig.from_teacher(teacher, **recipe.model)), teacher)


def tokenizer_classes(recipe: TokenizerRecipe) -> tuple[type[Any], type[Any]]:
    """Classes of the model that a recipe trains and of its config; ValueError for a kind that there is not."""
    kinds = MODELS | TEXT_MODELS
    if recipe.tokenizer not in kinds:
        known = ", ".join([*MODELS, "vqdraw_student", *TEXT_TOKENIZERS])
        raise ValueError(f"tokenizer must be one of {known}, got {recipe.tokenizer!r}")
    return kinds[recipe.tokenizer]


def build_tokenizer(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer:
    """An image tokenizer of the recipe's kind, its unset sizes and statistics read from the images."""
    model_class, config_class = tokenizer_classes(recipe)
    settings = infer_image_shape(rows) | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        draft = model_class(config_class(**settings))
        if not {"pixel_mean", "pixel_std"} & settings.keys():
            pixels = load_pixels(rows[:IMAGES_LOOKED_AT]["image"], draft)
            draft.config.pixel_mean = round(pixels.mean().item(), 4)
            draft.config.pixel_std = round(max(pixels.std().item(), 1e-3), 4)
    return draft


def build_text_model(recipe: TokenizerRecipe, rows: Dataset) -> TextSpanTokenizer:
    """A text model of the recipe's kind and settings; its alphabet and length, where they are not set, read from the captions."""
    model_class, config_class = TEXT_MODELS[recipe.tokenizer]
    texts = [caption.encode() for caption in rows["caption"]]
    settings: dict[str, Any] = {"alphabet": sorted({UNKNOWN_BYTE}.union(*texts))} | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if "max_length" not in settings:
            span = settings.get("span_length", config_class.span_length)
            smallest = model_class(config_class(**settings | {"max_length": span}))
            settings["max_length"] = span * max(
                sum(1 for _ in smallest.iter_chunks(text[:MAX_TEXT_BYTES])) for text in texts
            )
        return model_class(config_class(**settings))


def infer_image_shape(rows: Dataset) -> dict[str, Any]:
    """`image_size` and `num_channels` of the first images: the shortest side down to a multiple of 4; 1 channel if all are grey."""
    images = load_images(rows[:IMAGES_LOOKED_AT]["image"])
    side = min(min(image.size) for image in images)
    return {"image_size": max(4, side // 4 * 4), "num_channels": 1 if all(map(is_grey, images)) else 3}


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has the same value in all three channels everywhere."""
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()
