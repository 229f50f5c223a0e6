"""Demo: the whole pipeline on the built-in captioned shapes, from tokenizers to generated images and metrics.

The folder of a step appears when the step is complete, so a second run does only the missing steps.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.auto import load_image_tokenizer
from tokenizers_vq.images.processing import images_from_pixels

from ..atomic_io import write_atomically
from ..data.images import load_pixels
from ..data.shapes import shapes_dataset
from ..device import to_device
from ..evaluation.metrics import caption_accuracy, evaluate_tokenizer, memorization_rate
from ..evaluation.reports import load_image_codes, report_on_losses
from ..evaluation.shapes_verifier import verify_scene
from ..pipelines.text_to_image import TextToImagePipeline
from ..recipes.config import PriorRecipe, RunSettings, TokenizerRecipe
from ..recipes.train_prior import train_prior
from ..recipes.train_tokenizer import train_tokenizer
from ..visualization.image_sheets import make_captioned_sheet, save_image
from ..visualization.tokenizer_sheets import render_reconstructions, render_stages
from .output import silence_transformers

SPLITS = {"seen": "train", "held_out": "held_out", "unseen_pairs": "unseen_pairs"}
SHAPES: dict[str, Any] = {"data": "shapes", "max_train_samples": 20_000, "sample_steps": 0}
# Sizes that train in minutes on two CPU cores.
VQVAE_RECIPE = TokenizerRecipe(
    tokenizer="vqvae",
    max_steps=900,
    batch_size=16,
    optimizer="muon",
    learning_rate=3e-3,
    eval_steps=0,
    model={"codebook_size": 256, "hidden_channels": 64, "decay": 0.95},
    **SHAPES,
)
# AdamW, because in so few steps Muon does not reach a lower error here.
VQDRAW_RECIPE = TokenizerRecipe(
    tokenizer="vqdraw",
    max_steps=60,
    batch_size=32,
    learning_rate=4e-3,
    eval_steps=0,
    model={"num_stages": 20, "hidden_channels": 32, "feature_channels": 32, "num_residual_blocks": 1},
    **SHAPES,
)
# Guidance hurts here: given an image's first codes the model predicts the rest with or without a caption.
# A low temperature costs little variety, because only an object's position within its cell is left open.
PRIOR_RECIPE = PriorRecipe(
    max_steps=1200,
    batch_size=32,
    learning_rate=2e-3,
    depth=3,
    dropout=0.0,
    eval_steps=400,
    max_eval_samples=500,
    guidance_scale=1.0,
    temperature=0.3,
    **SHAPES,
)
# A smoke test: just enough steps to run every stage.
QUICK_SETTINGS: dict[str, Any] = {"max_train_samples": 64, "max_steps": 2, "batch_size": 8, "logging_steps": 1}
QUICK_MODELS = {
    "vqvae": {"codebook_size": 16, "hidden_channels": 32},
    "vqdraw": VQDRAW_RECIPE.model | {"codebook_size": 8},
}


def run_demo(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the missing steps of the demo and print where the results are.

    Args:
        out: Folder for all results.
        quick: Run every stage for a few steps only, as a smoke test.

    Returns:
        The content of `metrics.json`.
    """
    silence_transformers()
    started = time.time()
    num_images = 8 if quick else 500
    for recipe in (VQVAE_RECIPE, VQDRAW_RECIPE):
        quick_settings = QUICK_SETTINGS | {"model": QUICK_MODELS[recipe.tokenizer]} if quick else {}
        train_if_missing(train_tokenizer, replace(recipe, out=str(out / recipe.tokenizer), **quick_settings))
    reports = {name: evaluate_on_shapes(out / name, num_images) for name in ("vqvae", "vqdraw")}
    best = max(reports, key=lambda name: reports[name]["accepted"])
    accepted = ", ".join(f"{name} {report['accepted']:.1%}" for name, report in reports.items())
    print(f"reconstructions that the verifier accepts: {accepted}; the prior uses {best}")
    quick_settings = QUICK_SETTINGS | {"depth": 1, "eval_steps": 0} if quick else {}
    train_if_missing(
        train_prior, replace(PRIOR_RECIPE, out=str(out / "model"), image_tokenizer=str(out / best), **quick_settings)
    )
    if not (out / "metrics.json").is_file():
        pipeline = to_device(TextToImagePipeline.from_pretrained(out / "model"))
        save_sheets(out, pipeline, load_image_tokenizer(out / "vqdraw"))
        metrics = {"tokenizers": reports, "tokenizer_of_the_model": best, **evaluate_prior(pipeline, out, num_images)}
        write_atomically(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    metrics = json.loads((out / "metrics.json").read_text())
    print_summary(out, metrics, time.time() - started)
    return metrics


def train_if_missing(train: Callable[[Any], Any], recipe: RunSettings) -> None:
    """Run one training recipe, unless an earlier demo has completed it."""
    if Path(recipe.out, "config.json").is_file():
        print(f"{recipe.out} exists already")
    else:
        print(f"training {recipe.out}")
        train(recipe)


def evaluate_on_shapes(folder: Path, num_images: int) -> dict[str, Any]:
    """Evaluate a tokenizer on held-out images.

    Args:
        folder: Folder of the tokenizer.
        num_images: Number of images.

    Returns:
        The report of `evaluate_tokenizer`, and as `accepted` the fraction of reconstructions that the verifier accepts.
    """
    image_tokenizer = load_image_tokenizer(folder)
    rows = shapes_dataset("validation", num_images)
    pixel_values = load_pixels(rows["image"], image_tokenizer)
    reconstructions = images_from_pixels(image_tokenizer.decode(image_tokenizer.encode(pixel_values)))
    report = evaluate_tokenizer(image_tokenizer, list(pixel_values.split(250)))
    return report | {"accepted": caption_accuracy(reconstructions, rows["caption"], verify_scene)}


def evaluate_prior(pipeline: TextToImagePipeline, out: Path, num_images: int) -> dict[str, Any]:
    """Evaluate the prior with its default sampling settings.

    Args:
        pipeline: The trained model.
        out: Folder of the demo, with the training tokens.
        num_images: Images per split: captions seen in training, held-out ones, and unseen pairs of shape and color.

    Returns:
        Caption accuracy and memorization rate by split, and the losses on held-out images.
    """
    accuracy, memorized = {}, {}
    training_codes = load_image_codes(out / "model" / "tokens")
    for name, split in SPLITS.items():
        captions = shapes_dataset(split, num_images)["caption"][:]
        print(f"generating {len(captions)} images from captions: {name}")
        output = pipeline(captions, seed=0, progress=True)
        images: Any = output.images
        accuracy[name] = caption_accuracy(images, captions, verify_scene)
        memorized[name] = memorization_rate(output.codes, training_codes)
    losses = report_on_losses(pipeline, shapes_dataset("validation", num_images))
    return {"caption_accuracy": accuracy, "memorization_rate": memorized, "losses": losses}


def save_sheets(out: Path, pipeline: TextToImagePipeline, vqdraw: DiscreteTokenizer) -> None:
    """Save samples.png, reconstructions.png and stages.png."""
    captions = [caption for split in SPLITS.values() for caption in shapes_dataset(split, 16, seed=1)["caption"]]
    images: Any = pipeline(captions, seed=1).images
    save_image(make_captioned_sheet(images, captions), out / "samples.png")
    originals = shapes_dataset("validation", 16)["image"][:]
    save_image(render_reconstructions(pipeline.processor.image_tokenizer, originals), out / "reconstructions.png")
    save_image(render_stages(vqdraw, vqdraw.encode(load_pixels(originals[:8], vqdraw))), out / "stages.png")


def print_summary(out: Path, metrics: dict[str, Any], seconds: float) -> None:
    """Print the caption accuracy and the paths of the results."""
    accuracy = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in metrics["caption_accuracy"].items())
    print(f"\ncaption accuracy: {accuracy}")
    for name in ("samples.png", "reconstructions.png", "stages.png", "metrics.json", "model"):
        print(f"  {out / name}")
    print(
        f"{seconds / 60:.1f} minutes. Try: tok2img generate 'a large red ring above a small blue square' "
        f"--model {out / 'model'} --out image.png"
    )
