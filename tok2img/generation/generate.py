"""Ids in, image codes out: sampling from a prior. Knows no text and no pixels.

The prior's own code runs the layers with a key-value cache; only the head rows of each position's codes are computed. An image depends
on its prompt, `seed` and index alone, never on the batch it is drawn in.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, PreTrainedModel

from ..prior.model import segment_logits
from ..tokenization.layout import SequenceLayout
from .kv_cache import make_cache
from .sampling import Sampling, apply_guidance, sample_codes, streams_of_rows

CACHE_BYTES = 2**30
# A prior of two layers on one core takes 18.1, 6.2, 4.6 and 3.1 ms for each of 16, 64, 128 and 256 images of 49 codes.
MAX_BATCH = 256


@torch.no_grad()
def generate(
    prior: PreTrainedModel,
    layout: SequenceLayout,
    text_ids: Tensor,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    uniforms: Tensor | None = None,
    negative_text_ids: Tensor | None = None,
    given_codes: Tensor | None = None,
    keep: Tensor | None = None,
    use_cache: bool = True,
    compile: bool = False,
    on_code: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw an image's codes for every prompt, `b t` -> `b n` int64.

    Args:
        text_ids: text `b t` as the processor makes it; left as it is.
        indices: the number of each image in its stream of `seed`, `0..b-1` when left out.
        uniforms: streams of numbers from 0 to below 1, `b n`, in place of those of `seed` and `indices`.
        negative_text_ids: what guidance leads away from, `b t`; the empty caption when left out.
        given_codes: codes `b n` of images to complete or to vary, and `keep` `n`: true where they stay. The others are drawn anew, each
            from the codes before it alone; kept codes in a row cost one pass, however many.
        use_cache: False computes every step from the start, which gives the same codes slower.
        compile: run the layers through `torch.compile`, which takes long at first and for each new size of batch; for GPUs.
        on_code: called after each code that is drawn, with its position and all codes so far, `b n`.

    Raises:
        ValueError: for inputs whose sizes do not fit each other or the layout, and given codes that are out of range.
    """
    sampling = sampling or Sampling()
    cache = make_cache(prior, layout.sequence_length, use_cache=use_cache, compiled=compile)
    check_rows(len(text_ids), indices=indices, uniforms=uniforms, negative_text_ids=negative_text_ids)
    kept, codes = start_codes(layout, len(text_ids), given_codes, keep)
    codes = codes.to(prior.device)
    scales = sampling.guidance_schedule(layout.num_codes)
    is_guided = any(scale != 1 for scale in scales)
    if uniforms is None:
        uniforms = streams_of_rows(len(text_ids), layout.num_codes, seed=seed, indices=indices)
    unread = with_unconditional(layout, text_ids, negative_text_ids) if is_guided else layout.prompt(text_ids)
    unread = unread.to(prior.device)
    for position, first in enumerate(layout.image.position_offsets().tolist()):
        if not kept[position]:
            hidden = next_hidden_state(prior, unread, cache, compiled=compile)
            logits = segment_logits(prior, hidden, first, first + layout.codebook_size).float()
            logits = apply_guidance(logits, scales[position]) if is_guided else logits
            codes[:, position] = sample_codes(logits, uniforms[:, position], sampling)
            if on_code is not None:
                on_code(position, codes)
        new_ids = (codes[:, position] + first).repeat(1 + is_guided)[:, None]
        read = cache is not None and not kept[position]
        unread = new_ids if read else torch.cat([unread, new_ids], dim=1)
    return codes


def with_unconditional(layout: SequenceLayout, text_ids: Tensor, negative_text_ids: Tensor | None) -> Tensor:
    """Prompts of texts `b t`, and under them those that guidance leads away from, `2b s`."""
    empty = layout.null_text_ids(len(text_ids)) if negative_text_ids is None else negative_text_ids
    return torch.cat([layout.prompt(each.to(text_ids.device)) for each in (text_ids, empty)])


def check_rows(num: int, **inputs: Any) -> None:
    """ValueError for no prompts, and for an input that has another number of rows than there are."""
    if not num:
        raise ValueError("got no prompts to draw images of")
    for name, given in inputs.items():
        if given is not None and len(given) != num:
            raise ValueError(f"got {len(given)} {name} for {num} prompts")


def start_codes(
    layout: SequenceLayout, num: int, given_codes: Tensor | None, keep: Tensor | None
) -> tuple[list[bool], Tensor]:
    """Which positions are kept, and the codes `b n` before any is drawn."""
    if given_codes is None and keep is None:
        return [False] * layout.num_codes, torch.zeros(num, layout.num_codes, dtype=torch.int64)
    if given_codes is None or keep is None:
        raise ValueError("given_codes and keep go together, got one of them")
    if given_codes.shape != (num, layout.num_codes) or keep.shape != (layout.num_codes,) or keep.dtype != torch.bool:
        raise ValueError(
            f"given_codes must be `{num} {layout.num_codes}` and keep booleans `{layout.num_codes}`,"
            f" got {tuple(given_codes.shape)} and {keep.dtype} {tuple(keep.shape)}"
        )
    wrong = (given_codes < 0) | (given_codes >= layout.codebook_size)
    if wrong.any():
        raise ValueError(f"given_codes must lie in 0..{layout.codebook_size - 1}, got {given_codes[wrong][0].item()}")
    return keep.tolist(), given_codes.long().clone()


def next_hidden_state(
    prior: PreTrainedModel, input_ids: Tensor, cache: Cache | None, *, compiled: bool = False
) -> Tensor:
    """The state `b d` under the head after these ids `b s` (and those in the cache); `compiled` where it is a step of one id."""
    layers = compiled_trunk(prior.base_model) if compiled and input_ids.shape[1] == 1 else prior.base_model
    return layers(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state[:, -1]


def max_batch_size(prior: PreTrainedModel, layout: SequenceLayout, *, guidance: bool) -> int:
    """How many images to draw at once: their keys and values take a gigabyte at most."""
    config: Any = prior.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * heads * head_size * layout.sequence_length
    bytes_per_image = numbers * prior.dtype.itemsize * (2 if guidance else 1)
    return max(1, min(MAX_BATCH, CACHE_BYTES // bytes_per_image))


class LayoutLogitsProcessor(LogitsProcessor):
    """Keeps stock `model.generate` within the ids that a layout allows at each position after the prompt."""

    def __init__(self, layout: SequenceLayout):
        self.layout, self.offsets = layout, layout.image.position_offsets().tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`b s` and `b v` -> `b v` with every id out of range at minus infinity."""
        first = self.offsets[input_ids.shape[1] - self.layout.prompt_length]
        allowed = slice(first, first + self.layout.codebook_size)
        masked = torch.full_like(scores, float("-inf"))
        masked[:, allowed] = scores[:, allowed]
        return masked


@lru_cache(maxsize=1)
def compiled_trunk(trunk: nn.Module) -> Callable[..., Any]:
    """A prior without its head, compiled once: half a minute on a CPU. On CUDA, graphs start its kernels (not measured)."""
    return torch.compile(trunk, mode="reduce-overhead")
