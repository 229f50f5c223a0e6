"""Carries recipes for tokenizers out, ending in a folder that loads as it stands; and what every training run has in common."""

from datasets import Dataset

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.model_with_loss import get_inner_model

from ..data.augmentation import Augmentation
from ..tokenization.text_tokenizer import SubwordTokenizer, TextTokenizer
from ..trainer.datasets import ImageDataset, TextDataset
from ..trainer.trainer import Trainer
from ..visualization.tokenizer_sheets import render_held_out
from .build_tokenizer import TEXT_TOKENIZERS, build_model
from .config import TokenizerRecipe, require
from .run_folder import goes_on
from .training_run import arguments, finish, open_data, split


def train_tokenizer(recipe: TokenizerRecipe) -> DiscreteTokenizer | TextTokenizer:
    """Train a tokenizer on the images of a data set, or on its captions, and save it to `recipe.out`."""
    require(recipe, "data", "out")
    of_text, augment = recipe.tokenizer in TEXT_TOKENIZERS, augmentation_of(recipe)
    rows = open_data(recipe, with_captions=of_text, with_images=not of_text)
    if recipe.tokenizer == "bpe":
        text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=recipe.vocab_size)
        text_tokenizer.save_pretrained(recipe.out)
        return text_tokenizer
    goes_on(recipe)  # refuses another run's checkpoints, before long work
    model = build_model(recipe, rows)
    tokenizer = get_inner_model(model)
    training_rows, held_out = split(rows, recipe)
    trainer = Trainer(
        model,
        arguments(recipe, best_by="" if recipe.disc_start else "loss"),
        train_dataset=training_dataset(tokenizer, training_rows),
        eval_dataset=training_dataset(tokenizer, held_out),
        augment=augment,
        draw=lambda: render_held_out(tokenizer, held_out),
        draw_every=recipe.sample_steps,
        starts_from_data=not recipe.init_from,
        optimizer=recipe.optimizer,
        adamw_lr_scale=recipe.adamw_lr_scale,
    )
    finish(trainer, recipe, lambda folder, model: model.eval().save_pretrained(str(folder)))
    return tokenizer


def augmentation_of(recipe: TokenizerRecipe) -> Augmentation:
    """What a recipe does to images in training; ValueError for a share that is none, and for a tokenizer of text."""
    augment = Augmentation(recipe.flip, recipe.crop, recipe.shift, recipe.warp)
    if augment and recipe.tokenizer in TEXT_TOKENIZERS:
        raise ValueError(
            f"keys 'flip', 'crop', 'shift' and 'warp' are for tokenizers of images, got {recipe.tokenizer!r}"
        )
    return augment


def training_dataset(tokenizer: DiscreteTokenizer, rows: Dataset) -> TextDataset | ImageDataset:
    """Rows as a tokenizer trains on them."""
    return TextDataset(rows, tokenizer) if isinstance(tokenizer, TextSpanTokenizer) else ImageDataset(rows, tokenizer)
