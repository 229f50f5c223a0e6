"""Image codes in, text ids out: captions from a prior that has learned to read images. Knows no text and no pixels.

As in `generation`, only the head rows that may follow are computed, and a caption depends on its image, `seed` and index alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..prior.model import caption_logits
from ..tokenization.layout import SequenceLayout
from .generate import next_hidden_state
from .kv_cache import make_cache
from .sampling import Sampling, sample_codes, streams_of_rows

CAPTION_KEY = "captions_images"  # the name under which generation_config.json says that a prior has learned to caption


def can_caption(prior: PreTrainedModel) -> bool:
    """Whether a prior has learned to caption."""
    return bool(getattr(prior.generation_config, CAPTION_KEY, False))


@torch.no_grad()
def caption(
    prior: PreTrainedModel,
    layout: SequenceLayout,
    codes: Tensor,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Write a caption for every image, codes `b n` -> text `b t` int64, filled with [PAD]; it stops when all have ended.

    Args:
        sampling: the likeliest id each time when left out.
        indices: the number of each caption in its stream of `seed`, `0..b-1` when left out.
        use_cache: False computes every step from the start, which gives the same ids slower.

    Raises:
        ValueError: for guidance, which would need training without images, and codes that are not the layout's.
    """
    sampling = sampling or Sampling(temperature=0)
    if sampling.guidance_scale != 1:
        raise ValueError(f"captions are written without guidance, got guidance_scale {sampling.guidance_scale}")
    if indices is not None and len(indices) != len(codes):
        raise ValueError(f"got {len(indices)} indices for {len(codes)} images")
    sequence = step_ids = layout.caption_prompt(codes.to(prior.device))
    uniforms = streams_of_rows(len(codes), layout.text_length, seed=seed, indices=indices)
    cache = make_cache(prior, layout.sequence_length, use_cache=use_cache)
    text_ids = layout.null_text_ids(len(codes), prior.device)
    ended = torch.zeros(len(codes), dtype=torch.bool, device=prior.device)
    for position in range(layout.text_length):
        logits = caption_logits(prior, next_hidden_state(prior, step_ids, cache), layout).float()
        new_ids = sample_codes(logits, uniforms[:, position], sampling).masked_fill(ended, layout.pad_id)
        text_ids[:, position] = new_ids
        ended |= new_ids == layout.pad_id
        if ended.all():
            break
        sequence = torch.cat([sequence, new_ids[:, None]], dim=1)
        step_ids = sequence if cache is None else new_ids[:, None]
    return text_ids
