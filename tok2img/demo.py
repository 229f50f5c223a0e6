"""The whole job on the built-in captioned shapes: both tokenizers, a prior, pictures, and figures that say how good they are.

Each step leaves a folder that appears when the step is done, so a second run does only what is missing.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.images import images_from_pixels

from .cli import quiet
from .evaluation import caption_accuracy, evaluate_tokenizer, repeated_share
from .pipeline import TextToImagePipeline
from .plots import captioned_sheet, save_image, stage_sheet, write_atomically
from .processing import load_image_tokenizer, load_pixels, to_device
from .recipes import PriorRecipe, TokenizerRecipe
from .reports import codes_of, report_on_losses
from .runs import draw_reconstructions, train_prior, train_tokenizer
from .shapes import shapes_dataset
from .shapes_judge import judge

NUM_ROWS = 20_000
NUM_JUDGED = 500
SPLITS = {"seen": "train", "held_out": "held_out", "unseen_pairs": "unseen_pairs"}
STAGES_SHOWN = (1, 2, 4, 8, 12, 16, 20)


def run_demo(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Do what is not yet done of the demo, and say where everything is.

    Returns:
        What `metrics.json` holds.
    """
    quiet()
    started = time.time()
    recipes = demo_recipes(out, quick=quick)
    vqvae = step("VQ-VAE", out / "vqvae", lambda: train_tokenizer(recipes["vqvae"]))
    vqdraw = step("VQ-DRAW", out / "vqdraw", lambda: train_tokenizer(recipes["vqdraw"]))
    report = {"vqvae": report_on(vqvae, quick=quick), "vqdraw": report_on(vqdraw, quick=quick)}
    best = max(report, key=lambda name: report[name]["accepted"])
    print(
        f"the judge accepts {report['vqvae']['accepted']:.1%} of VQ-VAE's reconstructions, "
        f"{report['vqdraw']['accepted']:.1%} of VQ-DRAW's: pictures come from {best}"
    )
    recipe = recipes["prior"]
    recipe.image_tokenizer = str(out / best)
    step("prior", out / "model", lambda: train_prior(recipe))
    pipeline = to_device(TextToImagePipeline.from_pretrained(out / "model"))
    metrics = {"tokenizers": report, "tokenizer_of_the_model": best, **report_on_demo(pipeline, recipe, quick=quick)}
    draw_sheets(out, pipeline, load_image_tokenizer(out / best), load_image_tokenizer(out / "vqdraw"))
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print_summary(out, metrics, time.time() - started)
    return metrics


def demo_recipes(out: Path, *, quick: bool) -> dict[str, Any]:
    """The three training runs: sizes that two CPU cores finish in minutes, or in seconds when it need only run."""
    common: dict[str, Any] = {"data": "shapes", "max_rows": 600 if quick else NUM_ROWS, "log_every": 5 if quick else 50}
    vqvae = TokenizerRecipe(
        tokenizer="vqvae",
        out=str(out / "vqvae"),
        max_steps=10 if quick else 600,
        learning_rate=2e-3,
        eval_every=0,
        sample_every=0,
        model={"codebook_size": 256, "hidden_channels": 64},
        **common,
    )
    vqdraw = TokenizerRecipe(
        tokenizer="vqdraw",
        out=str(out / "vqdraw"),
        max_steps=5 if quick else 150,
        batch_size=32,
        learning_rate=4e-3,
        eval_every=0,
        sample_every=0,
        model={"num_stages": 20, "hidden_channels": 32, "feature_channels": 32, "num_residual_blocks": 1},
        **common,
    )
    prior = PriorRecipe(
        out=str(out / "model"),
        max_steps=10 if quick else 600,
        depth=2 if quick else 3,
        eval_every=10 if quick else 200,
        eval_rows=100 if quick else 500,
        sample_every=10 if quick else 200,
        dropout=0.0,
        **common,
    )
    return {"vqvae": vqvae, "vqdraw": vqdraw, "prior": prior}


def step(name: str, folder: Path, work: Callable[[], Any]) -> DiscreteTokenizer | None:
    """Do one step of the demo unless its folder is there; returns the image tokenizer in it, where it is one."""
    if (folder / "config.json").is_file():
        print(f"{name}: {folder} is there already")
    else:
        print(f"{name}: training")
        work()
    return None if (folder / "layout.json").is_file() else load_image_tokenizer(folder)


def report_on(image_tokenizer: Any, *, quick: bool) -> dict[str, Any]:
    """Errors and code usage on pictures it has not seen, and the share of their reconstructions that the judge accepts."""
    rows = shapes_dataset("validation", 50 if quick else NUM_JUDGED)
    pixel_values = load_pixels(rows["image"], image_tokenizer)
    reconstructions = images_from_pixels(image_tokenizer.decode(image_tokenizer.encode(pixel_values)))
    report = evaluate_tokenizer(image_tokenizer, list(pixel_values.split(250)))
    return report | {"accepted": caption_accuracy(reconstructions, rows["caption"], judge)}


def report_on_demo(pipeline: TextToImagePipeline, recipe: PriorRecipe, *, quick: bool) -> dict[str, Any]:
    """Caption accuracy with the default sampling settings on seen captions, held-out ones and unseen pairs; losses and repeats."""
    accuracy, repeats = {}, {}
    training_codes = codes_of(Path(recipe.out, "tokens"))
    for name, split in SPLITS.items():
        captions = shapes_dataset(split, 20 if quick else NUM_JUDGED)["caption"][:]
        print(f"drawing {len(captions)} pictures of captions: {name}")
        output = pipeline(captions, seed=0, progress=True)
        images: Any = output.images
        accuracy[name] = caption_accuracy(images, captions, judge)
        repeats[name] = repeated_share(output.codes, training_codes)
    losses = report_on_losses(pipeline, shapes_dataset("validation", 50 if quick else NUM_JUDGED))
    return {"caption_accuracy": accuracy, "repeated_share": repeats, "losses": losses}


def draw_sheets(out: Path, pipeline: TextToImagePipeline, best: DiscreteTokenizer, vqdraw: DiscreteTokenizer) -> None:
    """samples.png, reconstructions.png and stages.png."""
    captions = [caption for split in SPLITS.values() for caption in shapes_dataset(split, 16, seed=1)["caption"]]
    images: Any = pipeline(captions, seed=1).images
    save_image(captioned_sheet(images, captions), out / "samples.png")
    pictures = shapes_dataset("validation", 16)["image"][:]
    save_image(draw_reconstructions(best, pictures), out / "reconstructions.png")
    codes = vqdraw.encode(load_pixels(pictures[:8], vqdraw))
    shown = [count for count in STAGES_SHOWN if count <= vqdraw.num_codes]
    by_stage = [images_from_pixels(vqdraw.decode(codes[:, :count])) for count in shown]
    save_image(stage_sheet(list(zip(*by_stage, strict=True)), num_codes=shown), out / "stages.png")


def print_summary(out: Path, metrics: dict[str, Any], seconds: float) -> None:
    """What came out, and where it lies."""
    accuracy = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in metrics["caption_accuracy"].items())
    print(f"\ncaption accuracy: {accuracy}")
    for name in ("samples.png", "reconstructions.png", "stages.png", "metrics.json", "model"):
        print(f"  {out / name}")
    print(
        f"{seconds / 60:.1f} minutes. Try: tok2img generate 'a large red ring above a small blue square' "
        f"--model {out / 'model'} --out picture.png"
    )
