"""Carries recipes for tokenizers out, ending in a folder that loads as it stands; and what every training run has in common."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainingArguments

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
from tokenizers_vq.text_spans import UNKNOWN
from tokenizers_vq.with_loss import inner_of

from .augmentation import Augmentation
from .data import PICTURE_SUFFIXES, held_out_split, load_captioned_images
from .drawing import draw_held_out
from .fine_tuning import load_start, load_vqdraw
from .processing import load_images, load_pixels
from .recipes import RunSettings, TokenizerRecipe, require
from .resumption import checkpoints_of, close_run, goes_on, open_run
from .text import SubwordTokenizer, TextTokenizer
from .text_codes import TEXT_MODELS
from .trainer import PictureRows, TextRows, Trainer
from .training_log import save_log
from .training_losses import with_losses
from .whole_files import added_to

MODELS = {"vqvae": (VQVAE, VQVAEConfig), "vqdraw": (VQDrawForImages, VQDrawImageConfig)}
TEXT_TOKENIZERS = (*TEXT_MODELS, "bpe")
MAX_TEXT_BYTES = 96
HELD_OUT_SHARE = 0.05
PICTURES_LOOKED_AT = 512


def train_tokenizer(recipe: TokenizerRecipe) -> DiscreteTokenizer | TextTokenizer:
    """Train a tokenizer on the pictures of a data set, or on its captions, and save it to `recipe.out`."""
    require(recipe, "data", "out")
    of_text, augment = recipe.tokenizer in TEXT_TOKENIZERS, augmentation_of(recipe)
    rows = open_data(recipe, with_captions=of_text, with_images=not of_text)
    if recipe.tokenizer == "bpe":
        text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=recipe.vocab_size)
        text_tokenizer.save_pretrained(recipe.out)
        return text_tokenizer
    goes_on(recipe)  # refuses another run's checkpoints, before long work
    model = build_model(recipe, rows)
    tokenizer = inner_of(model)
    training_rows, held_out = split(rows, recipe)
    trainer = Trainer(
        model,
        arguments(recipe, best_by="" if recipe.adversarial_start else "loss"),
        train_dataset=rows_for(tokenizer, training_rows),
        eval_dataset=rows_for(tokenizer, held_out),
        augment=augment,
        draw=lambda: draw_held_out(tokenizer, held_out),
        draw_every=recipe.sample_every,
        starts_from_data=not recipe.start_from,
        optimizer=recipe.optimizer,
        adamw_scale=recipe.adamw_scale,
    )
    finish(trainer, recipe, lambda folder, model: model.eval().save_pretrained(str(folder)))
    return tokenizer


def augmentation_of(recipe: TokenizerRecipe) -> Augmentation:
    """What a recipe does to pictures in training; ValueError for a share that is none, and for a tokenizer of text."""
    augment = Augmentation(recipe.flip, recipe.crop, recipe.shift, recipe.warp)
    if augment and recipe.tokenizer in TEXT_TOKENIZERS:
        raise ValueError(
            f"keys 'flip', 'crop', 'shift' and 'warp' are for tokenizers of pictures, got {recipe.tokenizer!r}"
        )
    return augment


def build_model(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer | ModelWithLoss:
    """What is to be trained on the rows; a student with its teacher beside it, a VQ-VAE with its losses."""
    if recipe.tokenizer == "vqdraw_student":
        return build_student(recipe)
    if recipe.start_from:
        tokenizer = load_start(recipe, kind_of(recipe)[0])
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
        return Distillation(VQDrawStudent(VQDrawStudentConfig.of_teacher(teacher, **recipe.model)), teacher)


def kind_of(recipe: TokenizerRecipe) -> tuple[type[Any], type[Any]]:
    """Classes of the model that a recipe trains and of its config; ValueError for a kind that there is not."""
    kinds = MODELS | TEXT_MODELS
    if recipe.tokenizer not in kinds:
        known = ", ".join([*MODELS, "vqdraw_student", *TEXT_TOKENIZERS])
        raise ValueError(f"tokenizer must be one of {known}, got {recipe.tokenizer!r}")
    return kinds[recipe.tokenizer]


def rows_for(tokenizer: DiscreteTokenizer, rows: Dataset) -> TextRows | PictureRows:
    """Rows as a tokenizer trains on them."""
    return TextRows(rows, tokenizer) if isinstance(tokenizer, TextSpanTokenizer) else PictureRows(rows, tokenizer)


def open_data(recipe: RunSettings, *, with_captions: bool = True, with_images: bool = True) -> Dataset:
    """The training rows that a recipe names."""
    return load_captioned_images(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        with_captions=with_captions,
        with_images=with_images,
        max_rows=recipe.max_rows or None,
    )


def build_tokenizer(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer:
    """An image tokenizer of the recipe's kind, its unset sizes and statistics read from the pictures."""
    model_class, config_class = kind_of(recipe)
    settings = shape_of(rows) | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        draft = model_class(config_class(**settings))
        if not {"pixel_mean", "pixel_std"} & settings.keys():
            pixels = load_pixels(rows[:PICTURES_LOOKED_AT]["image"], draft)
            draft.config.pixel_mean = round(pixels.mean().item(), 4)
            draft.config.pixel_std = round(max(pixels.std().item(), 1e-3), 4)
    return draft


def build_text_model(recipe: TokenizerRecipe, rows: Dataset) -> TextSpanTokenizer:
    """A text model of the recipe's kind and settings; its alphabet and length, where they are not set, read from the captions."""
    model_class, config_class = TEXT_MODELS[recipe.tokenizer]
    texts = [caption.encode() for caption in rows["caption"]]
    settings: dict[str, Any] = {"alphabet": sorted({UNKNOWN}.union(*texts))} | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if "max_length" not in settings:
            span = settings.get("span_length", config_class.span_length)
            smallest = model_class(config_class(**settings | {"max_length": span}))
            settings["max_length"] = span * max(
                sum(1 for _ in smallest.pieces(text[:MAX_TEXT_BYTES])) for text in texts
            )
        return model_class(config_class(**settings))


def shape_of(rows: Dataset) -> dict[str, Any]:
    """`image_size` and `num_channels` of the first pictures: the shortest side down to a multiple of 4; 1 channel if all are grey."""
    pictures = load_images(rows[:PICTURES_LOOKED_AT]["image"])
    side = min(min(picture.size) for picture in pictures)
    return {"image_size": max(4, side // 4 * 4), "num_channels": 1 if all(map(is_grey, pictures)) else 3}


def is_grey(picture: Image.Image) -> bool:
    """Whether an RGB picture has the same value in all three channels everywhere."""
    red, green, blue = picture.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def split(rows: Dataset, recipe: RunSettings) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows for the held-out loss."""
    return held_out_split(rows, share=HELD_OUT_SHARE, max_rows=recipe.eval_rows, seed=recipe.seed)


def arguments(recipe: RunSettings, *, best_by: str = "loss", fsdp: bool = False) -> TrainingArguments:
    """The recipe's keys as arguments of transformers.

    With `eval_every`, `out/checkpoints` holds the best and the last weights while training goes on, and at the end the weights are those
    of the best held-out `best_by`, if that is named; else they are the last. All devices share a batch, so that a run means the
    same on any number of them; `docs/scale.md` names what differs: above all a ranker compares the rows of each device by themselves.

    Args:
        fsdp: processes share the weights too, each holding a part (FSDP2).

    Raises:
        ValueError: for a batch that cannot be shared evenly.
    """
    every, save_every = recipe.eval_every, recipe.save_every or recipe.eval_every
    shared: Any = True if fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    settings = TrainingArguments(
        output_dir=str(checkpoints_of(recipe)),
        max_steps=recipe.max_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.lr_schedule,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        adam_beta2=0.99,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(every and best_by),
        metric_for_best_model=best_by or None,
        greater_is_better=False,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.bf16,
        torch_compile=recipe.compile,
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # processes agree on theirs by themselves, and what each counts alone it keeps
        remove_unused_columns=False,
        report_to=recipe.report_to,
        seed=recipe.seed,
        fsdp=shared,
        fsdp_config={"version": 2, "reshard_after_forward": True},
    )
    share = share_of_batch(recipe.batch_size, num_devices=settings.world_size * max(1, settings.n_gpu))
    settings.per_device_train_batch_size = settings.per_device_eval_batch_size = share
    return settings


def share_of_batch(batch_size: int, *, num_devices: int) -> int:
    """How many rows of a batch each device takes; ValueError where it cannot be shared evenly."""
    if batch_size % num_devices:
        raise ValueError(
            f"key 'batch_size' is shared by {num_devices} devices and must be a multiple of that, got {batch_size}"
        )
    return batch_size // num_devices


def finish(trainer: Trainer, recipe: RunSettings, save: Callable[[Path, Any], None]) -> None:
    """Train to the end, put the result and the log into `recipe.out`, and clear the checkpoints, which nobody needs then.

    Args:
        save: writes the trained model into a folder.
    """
    if trainer.is_world_process_zero():
        open_run(recipe)
    trainer.train(resume_from_checkpoint=True)
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        with added_to(recipe.out) as folder:
            save(folder, model)
            save_log(trainer.state.log_history, folder)
        close_run(recipe)


def pictures_of(sources: list[str], *, split: str, num_images: int) -> list[Any]:
    """The first pictures of a data set, or the picture files that are named."""
    files = [Path(source) for source in sources]
    if all(file.suffix.lower() in PICTURE_SUFFIXES for file in files):
        return files
    if len(sources) > 1:
        raise ValueError(f"give one data set or several picture files, got {', '.join(sources)}")
    return load_captioned_images(sources[0], split=split, with_captions=False, max_rows=num_images)["image"][:]
