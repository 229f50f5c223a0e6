"""Finds the columns of images and captions: those that are named, else the usual names, else the only ones that fit."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Features, Value
from datasets import Image as ImageFeature

from tokenizers_vq.validation import did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_NAMES = ("caption", "text")
TEXT = (Value("string"), Value("large_string"))


def column_of_images(features: Features, wanted: str | None, source: str) -> str:
    """Find the column of images.

    Args:
        features: Columns and their types.
        wanted: Name of the column; None finds it.
        source: Name of the data, for errors.

    Raises:
        ValueError: If there is no such column, or it does not hold images or paths.
    """
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    images = images or [name for name, feature in features.items() if _may_hold_images(feature)]
    name = _one_column(features, wanted, ("image",), images, source)
    if not _may_hold_images(features[name]) and features[name] != Value("string"):
        raise ValueError(f"{source}: column {name!r} holds {features[name]}, not images")
    return name


def column_of_captions(features: Features, wanted: str | None, source: str) -> str:
    """Find the column of captions; arguments and errors as in `column_of_images`."""
    texts = [name for name, feature in features.items() if feature in TEXT and not name.startswith("__")]
    return _one_column(features, wanted, CAPTION_NAMES, texts, source)


def missing_column(name: str, available: Iterable[str]) -> str:
    """Return an error message for a missing column, with the available ones."""
    hint = did_you_mean(name, available)
    return f"no column {name!r}, only {', '.join(map(repr, available))}{f'; {hint}' if hint else ''}"


def _may_hold_images(feature: Any) -> bool:
    is_bytes = feature in (Value("binary"), Value("large_binary"))
    return is_bytes or isinstance(feature, ImageFeature) or (isinstance(feature, dict) and "bytes" in feature)


def _one_column(
    features: Features, wanted: str | None, usual: Sequence[str], suitable: Sequence[str], source: str
) -> str:
    names = [wanted] if wanted else [name for name in usual if name in features]
    if not names and len(suitable) == 1:
        names = suitable
    if not names or names[0] not in features:
        raise ValueError(f"{source}: {missing_column(wanted or usual[0], features)}")
    return names[0]
