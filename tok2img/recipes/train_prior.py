"""Train a prior from a recipe: images become tokens, tokens train a prior, and the whole model is saved in one folder."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.streaming import CaptionedRows, stream_captioned_images
from ..generation.captioning import CAPTION_KEY
from ..generation.sampling import Sampling
from ..pipelines.text_to_image import DROPOUT_KEY, TextToImagePipeline
from ..prior.lora import merge_lora
from ..prior.model import check_architecture
from ..tokenization.processor import Tok2ImgProcessor
from ..tokenization.token_dataset import load_tokens, save_tokens
from ..trainer.trainer import Trainer
from ..visualization.image_sheets import make_captioned_sheet
from ..visualization.tokenizer_sheets import NUM_SAMPLES
from .build_prior import build_prior_with_loss, export_prior
from .build_processor import build_processor
from .config import PriorRecipe, require
from .run_folder import can_resume, check_same_recipe
from .training_run import train_and_save, train_eval_split, training_arguments

logger = logging.getLogger(__name__)
TOKENS = "tokens"


def train_prior(recipe: PriorRecipe) -> TextToImagePipeline:
    """Train a prior on tokens and save the whole model to `recipe.out`. Tokenizes first if only data is given.

    Raises:
        ValueError: For keys that do not go together, data or tokens that do not fit, and checkpoints of another recipe.
    """
    # Everything that can be wrong is found before tokenizing, which may take hours.
    require(recipe, "out")
    check_architecture(recipe.architecture)
    sampling = Sampling(recipe.guidance_scale, recipe.temperature, recipe.top_k, recipe.top_p)
    # `PriorWithLoss` compiles the layers itself, so transformers must not compile the whole model.
    args = training_arguments(replace(recipe, torch_compile=False), best_by="image_loss", fsdp=recipe.fsdp)
    source, processor = load_training_source(recipe)
    model, adapter = build_prior_with_loss(recipe, processor)
    generation_config: Any = model.prior.generation_config
    sampling.write_to(generation_config)
    setattr(generation_config, DROPOUT_KEY, recipe.caption_dropout)
    if recipe.image_to_text_fraction:
        setattr(generation_config, CAPTION_KEY, True)

    tokens = source if isinstance(source, Dataset) else tokenize_on_all_ranks(recipe, source, processor)
    train_rows, eval_rows = train_eval_split(tokens.with_format("torch"), recipe)
    prompts = [processor.decode_text(row) for row in eval_rows["text_ids"][:NUM_SAMPLES]]

    def pipeline_of(prior: PreTrainedModel) -> TextToImagePipeline:
        return TextToImagePipeline(*export_prior(prior, processor, model.position_embeddings))

    def sample() -> Any:
        images: Any = pipeline_of(model.prior)(prompts, seed=0).images
        return make_captioned_sheet(images, prompts)

    trainer = Trainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        sample=sample,
        sample_steps=0 if args.fsdp else recipe.sample_steps,  # no process holds a whole prior under FSDP
        optimizer=recipe.optimizer,
        adamw_lr_scale=recipe.adamw_lr_scale,
    )
    image_tokenizer: Any = processor.image_tokenizer
    image_tokenizer.to(trainer.args.device)

    def save(folder: Path, trained: Any) -> None:
        if adapter is not None:
            merge_lora(adapter)
        model.eval()
        pipeline = pipeline_of(trained.to(trainer.args.device).eval())
        pipeline.save_pretrained(folder, sample_prompts=prompts, name=Path(recipe.out).name)
        saved.append(pipeline)

    saved: list[TextToImagePipeline] = []
    train_and_save(trainer, recipe, save)
    return saved[0] if saved else pipeline_of(model.prior)  # only the first process saves


def load_training_source(recipe: PriorRecipe) -> tuple[Dataset | CaptionedRows, Tok2ImgProcessor]:
    """Load what a recipe trains on, and the processor for it.

    Returns:
        A data set of tokens, or captioned images that have yet to be tokenized; and the processor.
    """
    check_same_recipe(recipe)
    own_tokens = Path(recipe.out, TOKENS)  # made by this run before it was interrupted
    if recipe.tokens or (can_resume(recipe) and own_tokens.is_dir()):
        folder = recipe.tokens or own_tokens
        tokens, processor = load_tokens(folder)
        if recipe.init_from:
            made_by, processor = processor, build_recipe_processor(recipe, [])
            check_same_tokenizers(processor, made_by, folder)
        return tokens.select(range(min(recipe.max_train_samples or len(tokens), len(tokens)))), processor
    require(recipe, "data", *([] if recipe.init_from else ["image_tokenizer"]))
    rows = stream_captioned_images(
        recipe.data,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        max_samples=recipe.max_train_samples,
    )
    return rows, build_recipe_processor(recipe, rows.captions)


def build_recipe_processor(recipe: PriorRecipe, captions: Any) -> Tok2ImgProcessor:
    """Build the processor from a recipe's keys."""
    return build_processor(
        captions,
        recipe.image_tokenizer,
        text_tokenizer=recipe.text_tokenizer,
        base_model=recipe.base_model,
        init_from=recipe.init_from,
        vocab_size=recipe.vocab_size,
        text_length=recipe.text_length,
        beam_size=recipe.beam_size,
        search_steps=recipe.search_steps,
    )


def check_same_tokenizers(processor: Tok2ImgProcessor, made_by: Tok2ImgProcessor, folder: str | Path) -> None:
    """Check that the tokens in a folder were made by a processor's tokenizers, whichever ids its layout gives them."""
    made = made_by.layout
    fits = processor.layout in (made, made.with_position_specific_ids())
    if not fits or processor.with_layout(made).fingerprint() != made_by.fingerprint():
        raise ValueError(
            f"the tokens in {folder} were made by other tokenizers than those of the model in init_from: "
            "give data instead, which the run then tokenizes"
        )


def tokenize_on_all_ranks(recipe: PriorRecipe, rows: CaptionedRows, processor: Tok2ImgProcessor) -> Dataset:
    """Tokenize captioned images into the run's folder, each process its shards, and load the tokens."""
    state, folder = PartialState(), Path(recipe.out, TOKENS)
    index, num = state.process_index, state.num_processes
    manifest = save_tokens(rows, processor, folder, shard_index=index, num_shards=num)
    state.wait_for_everyone()
    if state.is_main_process and manifest is None:  # all shards are there now: this call joins them
        manifest = save_tokens(rows, processor, folder, shard_index=index, num_shards=num)
    state.wait_for_everyone()
    if manifest and manifest["skipped"]:
        first = manifest["skipped"][0]
        logger.warning("skipped %d examples; example %d: %s", len(manifest["skipped"]), first["row"], first["reason"])
    return load_tokens(folder)[0]
