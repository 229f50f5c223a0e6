"""Verifiers that decide whether an image shows its caption."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer, load_image
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.loading import CONFIG_FILE

from ..data.loading import load_captioned_images
from ..data.shapes import IMAGE_SIZE, parse_caption
from .caption_classifier import MAX_CAPTIONS, CaptionClassifier, train_classifier
from .shapes_verifier import judge as judge_shapes

BATCH_SIZE = 250


@dataclass(frozen=True)
class Judge:
    """Says whether an image shows its caption; `features` maps images to `n d` for the Fréchet distance, where there are any."""

    shows: Callable[[Image.Image, str], bool]
    features: Callable[[Sequence[Any]], Tensor] | None = None
    accuracy_on_real: float | None = None


def find_verifier(
    rows: Dataset, image_tokenizer: DiscreteTokenizer, *, data: str, folder: str = "", **columns: Any
) -> Judge | None:
    """Who judges images of these captions.

    The exact judge for the built-in shapes; else a classifier of captions, loaded from `folder`, or trained on the data's training split
    and saved there. None where captions are too many, or too few, to tell apart by a classifier.
    """
    config: Any = image_tokenizer.config
    if config.image_size == IMAGE_SIZE and all(map(is_shapes_caption, sorted(set(rows["caption"]))[:20])):
        return Judge(judge_shapes)
    if folder and Path(folder, CONFIG_FILE).is_file():
        return classifier_judge(CaptionClassifier.load(folder), rows)
    training: Any = load_captioned_images(data, split="train", **columns)
    if not 2 <= len(set(training["caption"])) <= MAX_CAPTIONS:
        return None
    classifier = train_classifier(training, image_size=config.image_size, num_channels=config.num_channels)
    if folder:
        classifier.save(folder)
    return classifier_judge(classifier, rows)


def classifier_judge(classifier: CaptionClassifier, rows: Dataset) -> Judge:
    """A judge out of a classifier, and how many of the real rows it gets right."""

    def load(images: Sequence[Any]) -> Tensor:
        pil_images = [load_image(image) for image in images]
        return pixels_from_images(pil_images, image_size=classifier.image_size, num_channels=classifier.num_channels)

    def features(images: Sequence[Any]) -> Tensor:
        with torch.inference_mode():
            return torch.cat([classifier.features(load(some)) for some in batches(images)])

    told = [caption for images in batches(rows["image"]) for caption in classifier.predict(load(images))]
    right = sum(guess == caption for guess, caption in zip(told, rows["caption"], strict=True))
    return Judge(classifier.judge, features, right / len(rows))


def is_shapes_caption(caption: str) -> bool:
    """Whether a caption is of the built-in shapes' grammar."""
    try:
        parse_caption(caption)
    except ValueError:
        return False
    return True


def batches(column: Sequence[Any]) -> Iterator[list[Any]]:
    """A column in runs of `BATCH_SIZE`."""
    return (list(column[first : first + BATCH_SIZE]) for first in range(0, len(column), BATCH_SIZE))
