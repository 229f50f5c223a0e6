"""What stays of an image that is completed or varied: its codes, and which positions keep them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer

from ..data.images import load_images
from ..tokenization.processor import Tok2ImgProcessor

# The first so many codes, "top" for the upper half of a grid, or a truth value for each code.
Keep = int | str | Sequence[bool] | np.ndarray | Tensor


def keep_mask(keep: Keep, image_tokenizer: DiscreteTokenizer) -> Tensor:
    """Which codes stay, `n` booleans.

    Raises:
        ValueError: for more codes than there are, "top" where codes lie on no grid, and truth values of another number.
    """
    num_codes = image_tokenizer.num_codes
    if isinstance(keep, str):
        return upper_half(keep, image_tokenizer)
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 0 <= keep <= num_codes:
            raise ValueError(f"keep must be 0..{num_codes} codes, got {keep}")
        return torch.arange(num_codes) < keep
    mask = torch.as_tensor(keep)
    if mask.dtype != torch.bool or mask.numel() != num_codes:
        raise ValueError(
            f'keep must be a number of codes, "top", or {num_codes} truth values, got {mask.dtype} {tuple(mask.shape)}'
        )
    return mask.flatten().cpu()


def upper_half(keep: str, image_tokenizer: DiscreteTokenizer) -> Tensor:
    """The cells of the upper half of a grid (of every level, where a cell has several codes), `n` booleans."""
    shape = image_tokenizer.code_shape
    if keep != "top":
        raise ValueError(f'keep must be a number of codes, "top", or truth values, got {keep!r}')
    if len(shape) < 2:
        raise ValueError(f"codes of a {type(image_tokenizer).__name__} lie on no one grid with a top; keep a number")
    return (torch.arange(shape[-2])[:, None] < shape[-2] // 2).expand(shape).flatten()


def encode_init_images(images: Any, processor: Tok2ImgProcessor, num_prompts: int) -> Tensor:
    """Codes `b n` of one image, or of one for each prompt; codes, `n` or `b n`, pass as they are.

    Raises:
        ValueError: for another number of images, and for an image of another size than the model's: what to cut off, or to make up, is
            not ours to choose.
    """
    if isinstance(images, Tensor):
        codes = images.cpu() if images.ndim == 2 else images.cpu()[None]
    else:
        pil_images = load_images(images if isinstance(images, list | tuple) else [images])
        config: Any = processor.image_tokenizer.config
        for image in pil_images:
            if image.size != (config.image_size, config.image_size):
                width, height = image.size
                raise ValueError(
                    f"the image to keep codes of is {width}x{height}, the model draws {config.image_size}x{config.image_size}:"
                    " crop or resize it first"
                )
        codes = processor.encode_images(pil_images)
    if len(codes) not in (1, num_prompts):
        raise ValueError(f"got {len(codes)} images to keep codes of for {num_prompts} prompts")
    return codes.expand(num_prompts, -1)
