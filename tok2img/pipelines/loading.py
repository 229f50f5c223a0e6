"""Load the components of a pipeline from a folder or the hub."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenizers_vq.loading import first_line, resolve_folder

from ..prior.model import load_prior
from ..tokenization.layout import SequenceLayout
from ..tokenization.processor import Tok2ImgProcessor

REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_components(name: str | Path) -> tuple[PreTrainedModel, Tok2ImgProcessor]:
    """Prior and processor of a trained folder, or of one of the hub by its name; ValueError for what is neither."""
    folder = local_folder(name)
    prior = load_prior(folder, SequenceLayout.from_pretrained(folder))
    return prior, Tok2ImgProcessor.from_pretrained(folder)


def move(prior: Any, processor: Tok2ImgProcessor, *place: str | torch.device | torch.dtype) -> None:
    """Put a prior and its image tokenizer on a device, and the prior's weights into a type; the tokenizer's stay float32."""
    image_tokenizer: Any = processor.image_tokenizer
    prior.to(*place)
    image_tokenizer.to(*(each for each in place if not isinstance(each, torch.dtype)))


def local_folder(name: str | Path) -> Path:
    """The folder itself, or where a download of the hub's repository of that name lies; ValueError where there is none."""
    if Path(name).exists() or not REPOSITORY_NAME.fullmatch(str(name)):
        return Path(name)
    try:
        return resolve_folder(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a tok2img model folder, nor to be had from the hub: {first_line(error)}"
        ) from error


def batches(num: int, size: int, *, multiple: int = 1) -> Iterator[range]:
    """`0..num-1` in runs of nearly equal length, none longer than `size`, but all multiples of `multiple`, as `num` is."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    units, longest = num // multiple, max(1, size // multiple)
    length = math.ceil(units / math.ceil(units / longest)) * multiple
    return (range(first, min(first + length, num)) for first in range(0, num, length))
