"""Which columns of a data set hold images and captions: those that are named, else those of the usual names, else the only ones."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Features, Value
from datasets import Image as ImageFeature

from tokenizers_vq.validation import did_you_mean

CAPTION_NAMES = ("caption", "text")
TEXT = (Value("string"), Value("large_string"))


def column_of_images(features: Features, wanted: str | None, source: str) -> str:
    """The column of the images; ValueError where there is none, or it holds something else."""
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    images = images or [name for name, feature in features.items() if _may_hold_images(feature)]
    name = _one_column(features, wanted, ("image",), images, source)
    if not _may_hold_images(features[name]) and features[name] != Value("string"):
        raise ValueError(f"{source}: column {name!r} holds {features[name]}, not images")
    return name


def column_of_captions(features: Features, wanted: str | None, source: str) -> str:
    """The column of the captions; ValueError where there is none."""
    texts = [name for name, feature in features.items() if feature in TEXT and not name.startswith("__")]
    return _one_column(features, wanted, CAPTION_NAMES, texts, source)


def no_column(name: str, there: Iterable[str]) -> str:
    """That a column is not there, and which are, for errors."""
    hint = did_you_mean(name, there)
    return f"no column {name!r}, only {', '.join(map(repr, there))}{f'; {hint}' if hint else ''}"


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
        raise ValueError(f"{source}: {no_column(wanted or usual[0], features)}")
    return names[0]
