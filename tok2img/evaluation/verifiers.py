"""Verifiers that decide whether an image shows its caption."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.loading import CONFIG_FILE

from ..data.loading import load_captioned_images
from ..data.shapes import IMAGE_SIZE, parse_caption
from ..device import to_device
from .caption_classifier import MAX_CAPTIONS, CaptionClassifier, train_classifier
from .shapes_verifier import verify_scene

BATCH_SIZE = 250


@dataclass(frozen=True)
class CaptionVerifier:
    """Verifier of images against their captions.

    Attributes:
        verify: Function of an image and a caption; returns True if the image shows the caption.
        features: Function of n images to features `n d` for the Fréchet distance; None if the verifier has none.
        accuracy_on_real: Fraction of real images that it accepts with their own caption; None if not measured.
    """

    verify: Callable[[Image.Image, str], bool]
    features: Callable[[Sequence[Any]], Tensor] | None = None
    accuracy_on_real: float | None = None


def find_verifier(
    rows: Dataset, image_tokenizer: DiscreteTokenizer, *, data: str, folder: str = "", **columns: Any
) -> CaptionVerifier | None:
    """Find a verifier for the captions of a data set: load it, or train it.

    The built-in shapes have an exact one. For other data it is a `CaptionClassifier`.

    Args:
        rows: Real captioned images that the classifier was not trained on; they measure its accuracy.
        image_tokenizer: Gives the size and the channels of the images.
        data: Data set whose training split a new classifier learns from.
        folder: Folder of a saved classifier. A new one is saved there; "": it is not saved.
        columns: Names of the image and caption columns, as in `load_captioned_images`.

    Returns:
        The verifier, or None if a classifier cannot tell the captions apart: fewer than 2, or more than 1,000.
    """
    config: Any = image_tokenizer.config
    if config.image_size == IMAGE_SIZE and all(map(is_shapes_caption, sorted(set(rows["caption"]))[:20])):
        return CaptionVerifier(verify_scene)
    if folder and Path(folder, CONFIG_FILE).is_file():
        return verifier_from_classifier(CaptionClassifier.from_pretrained(folder), rows)
    training_rows: Any = load_captioned_images(data, split="train", **columns)
    if not 2 <= len(set(training_rows["caption"])) <= MAX_CAPTIONS:
        return None
    classifier = train_classifier(training_rows, image_size=config.image_size, num_channels=config.num_channels)
    if folder:
        classifier.save_pretrained(folder)
    return verifier_from_classifier(classifier, rows)


def verifier_from_classifier(classifier: CaptionClassifier, rows: Dataset) -> CaptionVerifier:
    """Make a verifier of a classifier, and measure its accuracy on real rows."""
    to_device(classifier)

    @torch.inference_mode()
    def features(images: Sequence[Any]) -> Tensor:
        pixel_batches = (classifier.load_pixels(batch).to(classifier.device) for batch in batches(images))
        return torch.cat([classifier.features(pixel_values) for pixel_values in pixel_batches])

    predictions = [
        caption for batch in batches(rows["image"]) for caption in classifier.predict(classifier.load_pixels(batch))
    ]
    num_right = sum(prediction == caption for prediction, caption in zip(predictions, rows["caption"], strict=True))
    return CaptionVerifier(classifier.verify, features, num_right / len(rows))


def is_shapes_caption(caption: str) -> bool:
    """Return True if the grammar of the built-in shapes can produce a caption."""
    try:
        parse_caption(caption)
    except ValueError:
        return False
    return True


def batches(column: Sequence[Any]) -> Iterator[list[Any]]:
    """Split a column into lists of up to `BATCH_SIZE` values."""
    return (list(column[first : first + BATCH_SIZE]) for first in range(0, len(column), BATCH_SIZE))
