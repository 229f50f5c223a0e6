"""Condition generation on an image: which of its codes to keep, and the codes themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_vq import DiscreteTokenizer

from ..data.images import load_images
from ..tokenization.processor import Tok2ImgProcessor

# A number of first codes, "top" for the upper half of a grid, or one boolean per code.
Keep = int | str | Sequence[bool] | np.ndarray | Tensor


def keep_mask(keep: Keep, image_tokenizer: DiscreteTokenizer) -> Tensor:
    """Build the mask of the codes to keep.

    Args:
        keep: A number (the first codes), "top" (the upper half of a grid), or a mask of one boolean per code
            in any shape.
        image_tokenizer: The tokenizer of the codes.

    Returns:
        Booleans `n`, True for codes to keep.

    Raises:
        ValueError: If `keep` is out of range or of another type, or "top" is asked of codes without a grid.
    """
    num_codes = image_tokenizer.num_codes
    if isinstance(keep, str):
        if keep != "top":
            raise ValueError(f'keep must be a number of codes, "top", or booleans, got {keep!r}')
        shape = image_tokenizer.code_shape
        if len(shape) < 2:
            name = type(image_tokenizer).__name__
            raise ValueError(
                f'Expected codes on one grid for keep="top", got those of a {name}: keep a number instead.'
            )
        # Where a cell has several codes (`q h w`), the upper half of each quantizer's grid.
        return (torch.arange(shape[-2])[:, None] < shape[-2] // 2).expand(shape).flatten()
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 0 <= keep <= num_codes:
            raise ValueError(f"keep must be 0..{num_codes} codes, got {keep}")
        return torch.arange(num_codes) < keep
    mask = torch.as_tensor(keep)
    if mask.dtype != torch.bool or mask.numel() != num_codes:
        raise ValueError(
            f'keep must be a number of codes, "top", or {num_codes} booleans, got {mask.dtype} {tuple(mask.shape)}'
        )
    return mask.flatten().cpu()


def encode_init_images(images: Any, processor: Tok2ImgProcessor, num_prompts: int) -> Tensor:
    """Encode the images whose codes are kept.

    Args:
        images: One image for all prompts, or a list with one per prompt; or codes, `n` or `b n`, which are
            returned as they are.
        processor: The processor with the image tokenizer.
        num_prompts: Number of prompts `b`.

    Returns:
        Codes, `b n`.

    Raises:
        ValueError: If the number of images does not fit, or an image has another size than the model's.
            Cropping or padding it is the caller's decision.
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
                    f"Expected an image of {config.image_size}x{config.image_size} pixels, the model's size, "
                    f"got {width}x{height}: crop or resize it first."
                )
        codes = processor.encode_images(pil_images)
    if len(codes) not in (1, num_prompts):
        raise ValueError(f"Expected one image to keep codes of, or {num_prompts}, one per prompt, got {len(codes)}.")
    return codes.expand(num_prompts, -1)
