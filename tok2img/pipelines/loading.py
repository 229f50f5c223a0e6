"""Load the components of a pipeline from a folder or the hub, and place them on a device."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenizers_vq.loading import first_line, resolve_model_folder

from ..prior.model import load_prior
from ..tokenization.layout import SequenceLayout
from ..tokenization.processor import Tok2ImgProcessor


def load_components(name: str | Path) -> tuple[PreTrainedModel, Tok2ImgProcessor]:
    """Load the prior and the processor of a trained model.

    Args:
        name: A local folder, or the name of a repository on the hub.

    Returns:
        The prior and the processor, both in eval mode.

    Raises:
        ValueError: If `name` is neither, or the model in it is incomplete.
    """
    folder = resolve_pipeline_folder(name)
    prior = load_prior(folder, SequenceLayout.from_pretrained(folder))
    return prior, Tok2ImgProcessor.from_pretrained(folder)


def resolve_pipeline_folder(name: str | Path) -> Path:
    """Return the local folder of a trained model; download it if `name` is a hub repository.

    Raises:
        ValueError: If `name` is neither a model folder nor a repository on the hub.
    """
    try:
        return resolve_model_folder(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a tok2img model folder, nor a repository on the hub: {first_line(error)}"
        ) from error


def move_to(prior: Any, processor: Tok2ImgProcessor, *device_or_dtype: str | torch.device | torch.dtype) -> None:
    """Move prior and image tokenizer to a device, and the prior's weights to a dtype.

    Args:
        prior: The prior.
        processor: The processor with the image tokenizer.
        *device_or_dtype: A device, a dtype, or both, in any order.
    """
    image_tokenizer: Any = processor.image_tokenizer
    prior.to(*device_or_dtype)
    # The image tokenizer stays in float32: bfloat16 would change up to 18 % of the codes.
    image_tokenizer.to(*(each for each in device_or_dtype if not isinstance(each, torch.dtype)))
