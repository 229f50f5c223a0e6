"""Reports on trained tokenizers and models: metrics as a dictionary, and figures on request."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from tokenizers_vq.auto import load_image_tokenizer

from ..atomic_io import write_atomically
from ..data.archives import MissingSplitError
from ..data.images import load_pixels
from ..data.loading import load_captioned_images
from ..device import to_device
from ..generation.captioning import can_caption, caption
from ..pipelines.text_to_image import TextToImagePipeline
from ..prior.loss import PriorWithLoss
from ..tokenization.processor import Tok2ImgProcessor
from ..tokenization.span_text_tokenizer import is_text_model, load_text_model
from ..tokenization.token_dataset import load_tokens
from ..trainer.training_log import load_log, replace_non_finite
from ..visualization.report_figures import save_model_figures, save_text_tokenizer_figures, save_tokenizer_figures
from .metrics import (
    caption_accuracy,
    caption_agreement,
    frechet_distance,
    measure_tokenizer,
    memorization_rate,
    unigram_entropy,
)
from .text_metrics import measure_text_tokenizer
from .verifiers import CaptionVerifier, batches, find_verifier

Report = dict[str, Any]
SaveFigures = Callable[[Path], list[str]]  # saves figures to a folder and returns the paths


def load_eval_split(data: str, *, split: str = "", **columns: Any) -> Dataset:
    """Load the rows to evaluate on.

    Args:
        data: Data set, as in `load_captioned_images`.
        split: Name of a split; "": the test split, or the validation split if the data set has none.
        columns: Further arguments of `load_captioned_images`.

    Raises:
        ValueError: As in `load_captioned_images`.
    """
    if split:
        return load_captioned_images(data, split=split, **columns)
    try:
        return load_captioned_images(data, split="test", **columns)
    except MissingSplitError:
        return load_captioned_images(data, split="validation", **columns)


def report_on_tokenizer(folder: str | Path, rows: Dataset) -> tuple[Report, SaveFigures]:
    """Report the reconstruction error and the code usage of a saved tokenizer.

    Args:
        folder: Folder of an image tokenizer or a VQ text tokenizer.
        rows: Held-out rows with an `image`, or for a text tokenizer a `caption`.

    Returns:
        The metrics of `evaluate_tokenizer` or `evaluate_text_tokenizer`, and a function that saves the figures.
    """
    log = load_log(folder)
    if is_text_model(folder):
        model = to_device(load_text_model(folder))
        report, histogram = measure_text_tokenizer(model, rows["caption"][:])
        return report, lambda into: save_text_tokenizer_figures(model, rows["caption"], histogram, log=log, folder=into)
    image_tokenizer = to_device(load_image_tokenizer(folder))
    pixel_batches = (
        load_pixels(images, image_tokenizer).to(image_tokenizer.device) for images in batches(rows["image"])
    )
    figures, histogram = measure_tokenizer(image_tokenizer, pixel_batches)
    return dict(figures), lambda into: save_tokenizer_figures(
        image_tokenizer, rows["image"], histogram, log=log, folder=into
    )


def report_on_model(
    folder: str | Path,
    rows: Dataset,
    *,
    data: str,
    tokens: str = "",
    verifier_folder: str = "",
    num_images: int = 1000,
    seed: int = 0,
    **columns: Any,
) -> tuple[Report, SaveFigures]:
    """Report the losses of a saved model, the quality of its images, and that of its captions if it can caption.

    Args:
        folder: Folder of the model.
        rows: Held-out rows with an `image` and a `caption`.
        data: Data set whose training split a new verifier learns from.
        tokens: Folder of the training tokens, for the memorization rate; "": it is not measured.
        verifier_folder: Folder of a caption classifier, see `find_verifier`.
        num_images: Number of images to generate.
        seed: Seed of the images.
        columns: Names of the image and caption columns of `data`.

    Returns:
        The metrics, and a function that saves the figures, see `save_model_figures`.
    """
    log, training_codes = load_log(folder), load_image_codes(tokens) if tokens else None
    pipeline = to_device(TextToImagePipeline.from_pretrained(folder))
    report = report_on_losses(pipeline, rows)
    if can_caption(pipeline.prior):
        report |= report_on_captions(pipeline, rows)
    verifier = find_verifier(rows, pipeline.processor.image_tokenizer, data=data, folder=verifier_folder, **columns)
    captions = balanced_prompts(rows["caption"], num_images, seed=seed)
    output = pipeline(captions, seed=seed, progress=True)
    images: Any = output.images
    report |= report_on_images(images, captions, verifier=verifier, real_images=rows["image"][:])
    if training_codes is not None:
        report["memorization_rate"] = memorization_rate(output.codes, training_codes)
    return report, lambda into: save_model_figures(images, captions, log=log, folder=into)


def report_on_losses(pipeline: TextToImagePipeline, rows: Dataset) -> Report:
    """Report the losses of a model on held-out rows, with reference values, all in nats.

    Args:
        pipeline: The model.
        rows: Held-out rows with an `image` and a `caption`.

    Returns:
        A dictionary with these entries.

        - `text_loss`, `image_loss`: Mean loss of a text token and of an image code.
        - `image_loss_without_caption`: Loss of an image code when the caption is empty.
        - `uniform_loss`: ln K, the loss of uniform predictions over K codes.
        - `unigram_entropy`: Loss of a prior that knows only how frequent each code is.
        - `information_gain_nats`: Reduction of an image's loss, summed over its codes, below that
        of uniform predictions.
        - `caption_information_nats`: Reduction of an image's loss by its caption; with C equally
        frequent captions at most
          ln C.
    """
    processor, layout = pipeline.processor, pipeline.processor.layout
    model = PriorWithLoss(pipeline.prior, layout).eval()
    sums = {"text_loss": 0.0, "image_loss": 0.0, "image_loss_without_caption": 0.0}
    codes = []
    for images, captions in zip(batches(rows["image"]), batches(rows["caption"]), strict=True):
        text_ids, image_codes = tokenize_batch(processor, captions, images)
        with torch.no_grad():
            conditional = model(text_ids.to(pipeline.prior.device), image_codes.to(pipeline.prior.device)).metrics
            null_text = layout.null_text_ids(len(text_ids), pipeline.prior.device)
            unconditional = model(null_text, image_codes.to(pipeline.prior.device)).metrics
        sums["text_loss"] += conditional["text_loss"].item() * len(text_ids)
        sums["image_loss"] += conditional["image_loss"].item() * len(text_ids)
        sums["image_loss_without_caption"] += unconditional["image_loss"].item() * len(text_ids)
        codes.append(image_codes)
    losses = {name: total / len(rows) for name, total in sums.items()}
    entropy = unigram_entropy(torch.cat(codes), codebook_size=layout.codebook_size, groups=layout.image.groups)
    return losses | {
        "uniform_loss": math.log(layout.codebook_size),
        "unigram_entropy": entropy,
        "information_gain_nats": layout.num_codes * (math.log(layout.codebook_size) - losses["image_loss"]),
        "caption_information_nats": layout.num_codes * (losses["image_loss_without_caption"] - losses["image_loss"]),
    }


def report_on_captions(pipeline: TextToImagePipeline, rows: Dataset) -> Report:
    """Compare the most likely captions of held-out images with those of the data; see `caption_agreement`."""
    processor, layout = pipeline.processor, pipeline.processor.layout
    texts, written = [], []
    for images, captions in zip(batches(rows["image"]), batches(rows["caption"]), strict=True):
        text_ids, codes = tokenize_batch(processor, captions, images)
        texts.append(text_ids)
        written.append(caption(pipeline.prior, layout, codes).cpu())
    return dict(caption_agreement(torch.cat(texts), torch.cat(written), pad_id=layout.pad_id))


def report_on_images(
    images: Sequence[Image.Image], captions: list[str], *, verifier: CaptionVerifier | None, real_images: Sequence[Any]
) -> Report:
    """Report how many generated images show their caption, and how far all are from real images.

    Args:
        images: Generated images.
        captions: The caption of each.
        verifier: Verifier of the captions; None: caption accuracy and Fréchet distance are left out.
        real_images: Held-out real images, in any form.
    """
    report: Report = {"num_images": len(captions)}
    if verifier is not None:
        report["caption_accuracy"] = caption_accuracy(images, captions, verifier.verify)
        report["verifier_accuracy_on_real"] = verifier.accuracy_on_real
    if verifier is not None and verifier.features is not None:
        report["frechet_distance"] = frechet_distance(verifier.features(images), verifier.features(real_images))
    return report


def load_image_codes(folder: str | Path) -> Tensor:
    """Load the image codes `b n` of a folder of tokens."""
    tokens, _ = load_tokens(folder)
    return torch.from_numpy(np.stack(tokens.with_format("numpy")["image_codes"][:]).astype(np.int64))


def save_report(report: Report, path: str | Path) -> str:
    """Save a report as JSON, with null for non-finite numbers, and return the JSON text."""
    text = json.dumps(replace_non_finite(report), indent=2)
    write_atomically(path, f"{text}\n".encode())
    return text


def balanced_prompts(captions: Sequence[str], num: int, *, seed: int) -> list[str]:
    """Choose prompts: each distinct caption equally often if there are at most `num`, else those of random rows.

    Args:
        captions: Captions of a data set.
        num: Number of prompts.
        seed: Seed of the choice of rows.
    """
    distinct = sorted(set(captions))
    if len(distinct) <= num:
        return sorted(distinct[number % len(distinct)] for number in range(num))
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    return [captions[int(row)] for row in order[:num]]


def tokenize_batch(processor: Tok2ImgProcessor, captions: list[str], images: list[Any]) -> tuple[Tensor, Tensor]:
    """Tokenize captions and images: text ids `b t` and image codes `b n`."""
    return processor.encode_text(captions), processor.encode_images(images)
