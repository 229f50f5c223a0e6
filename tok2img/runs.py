"""Carries recipes out: a tokenizer from pictures, a prior from tokens, ending in a folder that loads as it stands."""

import shutil
from collections.abc import Sequence
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
    VQDrawForImages,
    VQDrawForText,
    VQDrawImageConfig,
    VQDrawStudent,
    VQDrawStudentConfig,
    VQDrawTextConfig,
    VQVAEConfig,
)
from tokenizers_vq.vqdraw_text import UNKNOWN
from tokenizers_vq.with_loss import inner_of

from .codebook_start import codebooks_of, start_from_codebook
from .data import PICTURE_SUFFIXES, held_out_split, load_captioned_images
from .drawing import NUM_SAMPLES, draw_held_out, draw_samples, read_caption
from .pipeline import TextToImagePipeline
from .prior import PriorWithLoss, build_prior, check_architecture
from .processing import Tok2ImgProcessor, load_image_tokenizer, load_images, load_pixels, to_device
from .recipes import PriorRecipe, RunSettings, TokenizerRecipe, require
from .sampling import Sampling
from .text import SubwordTokenizer, TextTokenizer
from .text_codes import load_text_tokenizer
from .tokenized import fit_text, load_tokens, save_tokens
from .trainer import PictureRows, TextRows, Trainer
from .training_log import save_log
from .training_losses import with_losses

MODELS = {"vqvae": (VQVAE, VQVAEConfig), "vqdraw": (VQDrawForImages, VQDrawImageConfig)}
TEXT_TOKENIZERS = ("vqdraw_text", "bpe")
MAX_TEXT_BYTES = 96
HELD_OUT_SHARE = 0.05
PICTURES_LOOKED_AT = 512


def train_tokenizer(recipe: TokenizerRecipe) -> DiscreteTokenizer | TextTokenizer:
    """Train a tokenizer on the pictures of a data set, or on its captions, and save it to `recipe.out`."""
    require(recipe, "data", "out")
    of_text = recipe.tokenizer in TEXT_TOKENIZERS
    rows = open_data(recipe, with_captions=of_text, with_images=not of_text)
    if recipe.tokenizer == "bpe":
        text_tokenizer = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=recipe.vocab_size)
        text_tokenizer.save_pretrained(recipe.out)
        return text_tokenizer
    model = build_model(recipe, rows)
    tokenizer = inner_of(model)
    training_rows, held_out = split(rows, recipe)
    trainer = Trainer(
        model,
        arguments(recipe, best_by="" if recipe.adversarial_start else "loss"),
        train_dataset=rows_for(tokenizer, training_rows),
        eval_dataset=rows_for(tokenizer, held_out),
        draw=lambda: draw_held_out(tokenizer, held_out),
        draw_every=recipe.sample_every,
    )
    finish(trainer, recipe.out)
    tokenizer.eval().save_pretrained(recipe.out)
    return tokenizer


def build_model(recipe: TokenizerRecipe, rows: Dataset) -> DiscreteTokenizer | ModelWithLoss:
    """What is to be trained on the rows; a student with its teacher beside it, a VQ-VAE with its losses."""
    if recipe.tokenizer in TEXT_TOKENIZERS:
        return build_text_model(recipe, rows)
    if recipe.tokenizer != "vqdraw_student":
        tokenizer = build_tokenizer(recipe, rows)
        return with_losses(recipe, tokenizer) if isinstance(tokenizer, VQVAE) else tokenizer
    require(recipe, "teacher")
    teacher = load_teacher(recipe.teacher)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Distillation(VQDrawStudent(VQDrawStudentConfig.of_teacher(teacher, **recipe.model)), teacher)


def load_teacher(path: str) -> VQDrawForImages:
    """A saved VQ-DRAW model, or a checkpoint of the original; ValueError for anything else."""
    if Path(path).is_file():
        return VQDrawForImages.from_vq_draw_checkpoint(path)
    teacher = load_image_tokenizer(path)
    if not isinstance(teacher, VQDrawForImages):
        raise ValueError(f"{path} holds a {type(teacher).__name__}, not a VQ-DRAW model to learn from")
    return teacher


def rows_for(tokenizer: DiscreteTokenizer, rows: Dataset) -> TextRows | PictureRows:
    """Rows as a tokenizer trains on them."""
    return TextRows(rows, tokenizer) if isinstance(tokenizer, VQDrawForText) else PictureRows(rows, tokenizer)


def train_prior(recipe: PriorRecipe) -> TextToImagePipeline:
    """Train a prior on tokens (making them first where only data is given) and save the whole model to `recipe.out`."""
    require(recipe, "out")
    check_architecture(recipe.architecture)
    sampling = Sampling(recipe.guidance_scale, recipe.temperature, recipe.top_k, recipe.top_p)
    settings = arguments(recipe, best_by="image_loss")
    if not recipe.tokens:
        tokenize_for(recipe)
    tokens, processor = load_tokens(recipe.tokens or Path(recipe.out, "tokens"))
    if recipe.max_rows:
        tokens = tokens.select(range(min(recipe.max_rows, len(tokens))))
    layout = processor.layout
    prior = build_prior(
        layout, architecture=recipe.architecture, depth=recipe.depth, dropout=recipe.dropout, seed=recipe.seed
    )
    if recipe.start_from_codebook:
        start_from_codebook(prior, layout, codebooks_of(processor.image_tokenizer), seed=recipe.seed)
    model = PriorWithLoss(prior, layout, caption_dropout=recipe.caption_dropout, image_weight=recipe.image_weight)
    pipeline = TextToImagePipeline(prior, processor)
    pipeline.default_sampling, pipeline.caption_dropout = sampling, recipe.caption_dropout
    training_rows, held_out = split(tokens.with_format("torch"), recipe)
    prompts = [read_caption(row, processor) for row in held_out["text_ids"][:NUM_SAMPLES]]
    trainer = Trainer(
        model,
        settings,
        train_dataset=training_rows,
        eval_dataset=held_out,
        draw=lambda: draw_samples(pipeline, prompts),
        draw_every=recipe.sample_every,
    )
    pipeline.to(trainer.args.device)
    finish(trainer, recipe.out)
    prior.eval()
    pipeline.save_pretrained(recipe.out, sample_prompts=prompts)
    return pipeline


def tokenize_for(recipe: PriorRecipe) -> None:
    """Tokenize the recipe's data into `out/tokens`."""
    require(recipe, "data", "image_tokenizer")
    data = open_data(recipe)
    image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
    set_beam(image_tokenizer, recipe.beam_size)
    if recipe.start_from_codebook:
        codebooks_of(image_tokenizer)  # refuses what has none, before long work
    processor = build_processor(
        data["caption"],
        image_tokenizer,
        text_tokenizer=recipe.text_tokenizer,
        vocab_size=recipe.vocab_size,
        text_length=recipe.text_length,
    )
    save_tokens(data, processor, Path(recipe.out, "tokens"))


def build_processor(
    captions: Sequence[str],
    image_tokenizer: DiscreteTokenizer,
    *,
    text_tokenizer: str = "",
    vocab_size: int = 4096,
    text_length: int = 0,
) -> Tok2ImgProcessor:
    """A processor for these captions: a saved text tokenizer, or BPE learned from them; on a GPU where there is one."""
    given = load_text_tokenizer(text_tokenizer) if text_tokenizer else None
    text, length = fit_text(list(captions), text_tokenizer=given, vocab_size=vocab_size, text_length=text_length)
    return Tok2ImgProcessor.build(to_device(image_tokenizer), text, text_length=length)


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
    if recipe.tokenizer not in MODELS:
        raise ValueError(
            f"tokenizer must be one of {', '.join([*MODELS, 'vqdraw_student', *TEXT_TOKENIZERS])}, got {recipe.tokenizer!r}"
        )
    model_class, config_class = MODELS[recipe.tokenizer]
    settings = shape_of(rows) | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        draft = model_class(config_class(**settings))
        if not {"pixel_mean", "pixel_std"} & settings.keys():
            pixels = load_pixels(rows[:PICTURES_LOOKED_AT]["image"], draft)
            draft.config.pixel_mean = round(pixels.mean().item(), 4)
            draft.config.pixel_std = round(max(pixels.std().item(), 1e-3), 4)
    return draft


def build_text_model(recipe: TokenizerRecipe, rows: Dataset) -> VQDrawForText:
    """A text VQ-DRAW of the recipe's settings; its alphabet and length, where they are not set, read from the captions."""
    texts = [caption.encode() for caption in rows["caption"]]
    settings: dict[str, Any] = {"alphabet": sorted({UNKNOWN}.union(*texts))} | recipe.model
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if "max_length" not in settings:
            span = settings.get("span_length", VQDrawTextConfig.span_length)
            smallest = VQDrawForText(VQDrawTextConfig(**settings | {"max_length": span}))
            settings["max_length"] = span * max(len(smallest.pieces(text[:MAX_TEXT_BYTES])) for text in texts)
        return VQDrawForText(VQDrawTextConfig(**settings))


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


def arguments(recipe: RunSettings, *, best_by: str = "loss") -> TrainingArguments:
    """The recipe's keys as arguments of transformers.

    With `eval_every`, `out/checkpoints` holds the best and the last weights while training goes on, and at the end the weights are those
    of the best held-out `best_by`, if that is named; else they are the last.
    """
    every = recipe.eval_every
    return TrainingArguments(
        output_dir=str(Path(recipe.out, "checkpoints")),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.lr_schedule,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        adam_beta2=0.99,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(every and best_by),
        metric_for_best_model=best_by or None,
        greater_is_better=False,
        logging_steps=recipe.log_every,
        disable_tqdm=False,
        use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.bf16,
        torch_compile=recipe.compile,
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=recipe.report_to,
        seed=recipe.seed,
    )


def finish(trainer: Trainer, out: str) -> None:
    """Train to the end, keep the log, and clear the checkpoints that served to keep the best weights."""
    trainer.train()
    if trainer.is_world_process_zero():
        save_log(trainer.state.log_history, out)
        shutil.rmtree(Path(out, "checkpoints"), ignore_errors=True)


def set_beam(image_tokenizer: DiscreteTokenizer, beam_size: int) -> None:
    """How wide to search when a data set is tokenized; 0 leaves what the tokenizer's config says.

    Raises:
        ValueError: for a tokenizer that does not search, and a beam below 0.
    """
    if beam_size and not hasattr(image_tokenizer.config, "beam_size"):
        raise ValueError(f"a {type(image_tokenizer).__name__} has no beam to search with, got beam_size {beam_size}")
    if beam_size < 0:
        raise ValueError(f"beam_size must be at least 1, or 0 for the tokenizer's own, got {beam_size}")
    if beam_size:
        image_tokenizer.config.update({"beam_size": beam_size})


def pictures_of(sources: list[str], *, split: str, num_images: int) -> list[Any]:
    """The first pictures of a data set, or the picture files that are named."""
    files = [Path(source) for source in sources]
    if all(file.suffix.lower() in PICTURE_SUFFIXES for file in files):
        return files
    if len(sources) > 1:
        raise ValueError(f"give one data set or several picture files, got {', '.join(sources)}")
    return load_captioned_images(sources[0], split=split, with_captions=False, max_rows=num_images)["image"][:]
