"""Expand prompts to one row per image and split rows into batches."""

import math
from collections.abc import Iterator


def expand_prompts(prompt: str | list[str], num_images_per_prompt: int) -> list[str]:
    """Repeat each prompt once per image.

    Raises:
        ValueError: If there is no prompt, one is not a string, or no image is asked for.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"Expected prompt to be a caption or a list of captions, got {prompt!r}.")
    for caption in prompts:
        if not isinstance(caption, str):
            raise ValueError(f"Expected each prompt to be a string, got {type(caption).__name__}: {caption!r}.")
    if num_images_per_prompt < 1:
        raise ValueError(f"Expected num_images_per_prompt of at least 1, got {num_images_per_prompt}.")
    return [caption for caption in prompts for _ in range(num_images_per_prompt)]


def batches(num: int, size: int, *, multiple: int = 1) -> Iterator[range]:
    """Split `0..num-1` into ranges of nearly equal length.

    Args:
        num: Number of rows, a multiple of `multiple`.
        size: Largest length of a range.
        multiple: Every length is a multiple of this, even where that exceeds `size`.

    Returns:
        The ranges, in order.

    Raises:
        ValueError: If `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"Expected a batch_size of at least 1, got {size}.")
    units, longest = num // multiple, max(1, size // multiple)
    length = math.ceil(units / math.ceil(units / longest)) * multiple
    return (range(first, min(first + length, num)) for first in range(0, num, length))
