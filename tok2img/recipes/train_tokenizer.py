"""Train a tokenizer of images or of text from a recipe, and save it as a folder that loads by itself."""

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
from .run_folder import check_same_recipe
from .training_run import load_data, train_and_save, train_eval_split, training_arguments


def train_tokenizer(recipe: TokenizerRecipe) -> DiscreteTokenizer | TextTokenizer:
    """Train a tokenizer on the images, or the captions, of a data set, and save it to `recipe.out`.

    Raises:
        ValueError: For keys that do not go together, data that cannot be read, and checkpoints of another recipe.
    """
    require(recipe, "data", "out")
    is_text = recipe.tokenizer in TEXT_TOKENIZERS
    augment = Augmentation(recipe.flip, recipe.crop, recipe.shift, recipe.warp)
    if augment and is_text:
        raise ValueError(
            f"keys 'flip', 'crop', 'shift' and 'warp' are for tokenizers of images, got {recipe.tokenizer!r}"
        )
    rows = load_data(recipe, with_captions=is_text, with_images=not is_text)
    if recipe.tokenizer == "bpe":  # counted in one pass, without steps, checkpoints or a trainer
        text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=recipe.vocab_size)
        text_tokenizer.save_pretrained(recipe.out)
        return text_tokenizer
    check_same_recipe(recipe)  # before anything that takes long
    model = build_model(recipe, rows)
    tokenizer = get_inner_model(model)
    train_rows, eval_rows = train_eval_split(rows, recipe)
    trainer = Trainer(
        model,
        # With a discriminator the last weights are kept, see `TokenizerRecipe.disc_start`.
        training_arguments(recipe, best_by="" if recipe.disc_start else "loss"),
        train_dataset=training_dataset(tokenizer, train_rows),
        eval_dataset=training_dataset(tokenizer, eval_rows),
        augment=augment,
        sample=lambda: render_held_out(tokenizer, eval_rows),
        sample_steps=recipe.sample_steps,
        init_from_data=not recipe.init_from,
        optimizer=recipe.optimizer,
        adamw_lr_scale=recipe.adamw_lr_scale,
    )
    train_and_save(trainer, recipe, lambda folder, model: model.eval().save_pretrained(str(folder)))
    return tokenizer


def training_dataset(tokenizer: DiscreteTokenizer, rows: Dataset) -> TextDataset | ImageDataset:
    """Return examples in the form that a tokenizer trains on: `symbols` or `pixel_values`."""
    return TextDataset(rows, tokenizer) if isinstance(tokenizer, TextSpanTokenizer) else ImageDataset(rows, tokenizer)
