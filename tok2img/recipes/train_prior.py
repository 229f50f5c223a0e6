"""Carries recipes for priors out: tokens from images, a prior from tokens, ending in a folder that loads as it stands."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel

from tokenizers_vq.auto import load_image_tokenizer

from ..data.streaming import CaptionedRows, stream_captioned_images
from ..device import to_device
from ..generation.captioning import CAPTION_KEY
from ..generation.sampling import Sampling
from ..pipelines.text_to_image import TextToImagePipeline
from ..prior.codebook_init import get_codebooks, init_from_codebook
from ..prior.float32_attention import attend_in_float32
from ..prior.from_language_model import extend_prior
from ..prior.lora import LoraPriorWithLoss, add_lora, merge_lora
from ..prior.loss import PriorWithLoss
from ..prior.model import build_prior, check_architecture, load_prior
from ..prior.position_embeddings import AxialPositionEmbeddings, build_position_embeddings, with_position_specific_ids
from ..tokenization.processor import Tok2ImgProcessor
from ..tokenization.token_dataset import load_tokens, save_tokens
from ..trainer.trainer import Trainer
from ..visualization.image_sheets import make_captioned_sheet
from ..visualization.tokenizer_sheets import NUM_SAMPLES
from .build_processor import build_processor, set_encode_search
from .config import PriorRecipe, require
from .run_folder import goes_on
from .training_run import arguments, finish, split

logger = logging.getLogger(__name__)
TOKENS = "tokens"


def draw_samples(pipeline: TextToImagePipeline, prompts: list[str], *, seed: int = 0) -> Image.Image:
    """A sheet of images with their captions."""
    images: Any = pipeline(prompts, seed=seed).images
    return make_captioned_sheet(images, prompts)


def train_prior(recipe: PriorRecipe) -> TextToImagePipeline:
    """Train a prior on tokens (making them first where only data is given) and save the whole model to `recipe.out`."""
    require(recipe, "out")
    check_architecture(recipe.architecture)
    sampling = Sampling(recipe.guidance_scale, recipe.temperature, recipe.top_k, recipe.top_p)
    settings = arguments(
        replace(recipe, torch_compile=False), best_by="image_loss", fsdp=recipe.fsdp
    )  # its loss compiles
    source, processor = load_training_source(recipe)
    prior = init_prior(recipe, processor)  # before tokenizing, which may take long: what does not fit is found now
    adapted = add_lora(prior, processor.layout, rank=recipe.lora_rank, seed=recipe.seed) if recipe.lora_rank else None
    model = with_loss(recipe, prior, processor)
    if isinstance(source, Dataset):
        tokens = source
    else:
        tokenize_all_ranks(
            Path(recipe.out, TOKENS),
            source,
            processor,
            shard_index=settings.process_index,
            num_shards=settings.world_size,
        )
        tokens = load_tokens(Path(recipe.out, TOKENS))[0]
    pipeline = TextToImagePipeline(prior, processor)
    pipeline.default_sampling, pipeline.caption_dropout = sampling, recipe.caption_dropout
    if recipe.image_to_text_fraction:
        setattr(prior.generation_config, CAPTION_KEY, True)
    training_rows, held_out = split(tokens.with_format("torch"), recipe)
    prompts = [processor.decode_text(row) for row in held_out["text_ids"][:NUM_SAMPLES]]
    trainer = Trainer(
        model,
        settings,
        train_dataset=training_rows,
        eval_dataset=held_out,
        draw=lambda: draw_samples(
            TextToImagePipeline(*export_prior(prior, processor, model.position_embeddings)), prompts
        ),
        draw_every=0 if settings.fsdp else recipe.sample_steps,  # with parts of a prior nobody can draw
        optimizer=recipe.optimizer,
        adamw_lr_scale=recipe.adamw_lr_scale,
    )
    pipeline.to(trainer.args.device)

    def save(folder: Path, trained: Any) -> None:
        if adapted is not None:
            merge_lora(adapted)
        model.eval()
        trained = trained.to(trainer.args.device).eval()
        pipeline.prior, pipeline.processor = export_prior(trained, processor, model.position_embeddings)
        pipeline.save_pretrained(folder, sample_prompts=prompts, name=Path(recipe.out).name)

    finish(trainer, recipe, save)
    return pipeline


def load_training_source(recipe: PriorRecipe) -> tuple[Dataset | CaptionedRows, Tok2ImgProcessor]:
    """What a recipe names, a data set of tokens or captioned images that are yet to be tokenized, and the processor for them."""
    resumed, made_before = goes_on(recipe), Path(recipe.out, TOKENS)
    if recipe.tokens or (resumed and made_before.is_dir()):
        folder = recipe.tokens or made_before
        tokens, processor = load_tokens(folder)
        if recipe.init_from:
            made_by, processor = processor, load_init_processor(recipe)
            check_same_tokenizers(processor, made_by, folder)
        return tokens.select(range(min(recipe.max_train_samples or len(tokens), len(tokens)))), processor
    require(recipe, "data", *([] if recipe.init_from else ["image_tokenizer"]))
    rows = stream_captioned_images(
        recipe.data,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        max_samples=recipe.max_train_samples,
    )
    if recipe.init_from:
        return rows, load_init_processor(recipe)
    image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
    set_encode_search(image_tokenizer, beam_size=recipe.beam_size, search_steps=recipe.search_steps)
    processor = build_processor(
        rows.captions,
        image_tokenizer,
        text_tokenizer=recipe.text_tokenizer,
        base=recipe.base_model,
        vocab_size=recipe.vocab_size,
        text_length=recipe.text_length,
    )
    return rows, processor


def load_init_processor(recipe: PriorRecipe) -> Tok2ImgProcessor:
    """That of the model that a recipe goes on from, on a GPU where there is one."""
    processor = Tok2ImgProcessor.from_pretrained(recipe.init_from)
    set_encode_search(processor.image_tokenizer, beam_size=recipe.beam_size, search_steps=recipe.search_steps)
    to_device(processor.image_tokenizer)
    return processor


def check_same_tokenizers(processor: Tok2ImgProcessor, made_by: Tok2ImgProcessor, folder: str | Path) -> None:
    """ValueError where the tokens in a folder were made by other tokenizers than a processor's, under whichever ids."""
    made = made_by.layout
    fits = processor.layout in (made, made.with_position_specific_ids())
    if not fits or processor.with_layout(made).fingerprint() != made_by.fingerprint():
        raise ValueError(
            f"the tokens in {folder} were made by other tokenizers than those of the model to start from: "
            "give data instead, which the run then tokenizes"
        )


def init_prior(recipe: PriorRecipe, processor: Tok2ImgProcessor) -> PreTrainedModel:
    """The prior as it starts: a trained one, a base extended or random weights; codes from the codebook, where the recipe says so."""
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
        attend_in_float32(prior)
    return prior


def with_loss(recipe: PriorRecipe, prior: PreTrainedModel, processor: Tok2ImgProcessor) -> PriorWithLoss:
    """The prior with the recipe's loss."""
    kind = LoraPriorWithLoss if recipe.lora_rank else PriorWithLoss
    return kind(
        prior,
        processor.layout,
        caption_dropout=recipe.caption_dropout,
        image_loss_weight=recipe.image_loss_weight,
        image_to_text_fraction=recipe.image_to_text_fraction,
        position_embeddings=build_position_embeddings(prior, processor.layout)
        if recipe.axial_position_embeddings
        else None,
        compile=recipe.torch_compile,
    )


def export_prior(
    prior: PreTrainedModel, processor: Tok2ImgProcessor, position_embeddings: AxialPositionEmbeddings | None
) -> tuple[PreTrainedModel, Tok2ImgProcessor]:
    """A prior and processor that draw as the prior has learned to; one that has learned with places is copied, and they with it."""
    if position_embeddings is None:
        return prior, processor
    return with_position_specific_ids(prior, processor.layout, position_embeddings), processor.with_layout(
        processor.layout.with_position_specific_ids()
    )


def tokenize_all_ranks(
    folder: Path, data: CaptionedRows, processor: Tok2ImgProcessor, *, shard_index: int, num_shards: int
) -> None:
    """Make tokens of captioned images in a folder, each process its part, and wait until all is there; say which rows were skipped."""
    manifest = save_tokens(data, processor, folder, shard_index=shard_index, num_shards=num_shards)
    PartialState().wait_for_everyone()
    if shard_index == 0 and manifest is None:
        manifest = save_tokens(
            data, processor, folder, shard_index=shard_index, num_shards=num_shards
        )  # all files are complete now
    PartialState().wait_for_everyone()
    if manifest and manifest["skipped"]:
        first = manifest["skipped"][0]
        logger.warning("%d rows were skipped; row %d: %s", len(manifest["skipped"]), first["row"], first["reason"])
