"""Generate captions from image codes, with a prior trained in both directions.

As in `generate`, ids go in and ids come out, only the head rows that may follow are computed, and a caption
depends on its image, `seed` and index alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..prior.model import caption_logits
from ..tokenization.layout import SequenceLayout
from .generate import next_hidden_state
from .kv_cache import make_cache
from .sampling import Sampling, sample_codes, uniform_noise

CAPTION_KEY = "captions_images"  # in generation_config.json: true for a prior that has learned to caption


def can_caption(prior: PreTrainedModel) -> bool:
    """Return True if a prior has learned to caption."""
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
    """Generate a caption for every image.

    Generation stops as soon as all captions have ended.

    Args:
        prior: A prior that has learned to caption.
        layout: Its layout.
        codes: Image codes, `b n`.
        sampling: Sampling settings; greedy by default.
        seed: Seed of the noise.
        indices: Index of each caption in the noise of `seed`, `b`; `0..b-1` by default.
        use_cache: If False, compute every step from the start, which gives the same ids more slowly.

    Returns:
        Text ids, `b t` int64, filled up with [PAD].

    Raises:
        ValueError: If guidance is asked for, or `codes` or `indices` do not fit.

    Example:
        >>> import torch
        >>> from tok2img import SequenceLayout, build_prior, caption
        >>> layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
        >>> prior = build_prior(layout, depth=1)
        >>> caption(prior, layout, torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])).shape
        torch.Size([2, 3])
    """
    sampling = sampling or Sampling(temperature=0)
    # Guidance would compare with captions of no image, which training never shows.
    if sampling.guidance_scale != 1:
        raise ValueError(f"captions are generated without guidance, got guidance_scale {sampling.guidance_scale}")
    indices = range(len(codes)) if indices is None else indices
    if len(indices) != len(codes):
        raise ValueError(f"Expected one index per image, got {len(indices)} indices for {len(codes)} images.")
    sequence = step_ids = layout.caption_prompt(codes.to(prior.device))
    uniforms = uniform_noise(seed, indices, layout.text_length)
    cache = make_cache(prior, layout.sequence_length, use_cache=use_cache)
    text_ids = layout.null_text_ids(len(codes), prior.device)
    has_ended = torch.zeros(len(codes), dtype=torch.bool, device=prior.device)
    for position in range(layout.text_length):
        logits = caption_logits(prior, next_hidden_state(prior, step_ids, cache), layout).float()
        new_ids = sample_codes(logits, uniforms[:, position], sampling).masked_fill(has_ended, layout.pad_id)
        text_ids[:, position] = new_ids
        has_ended |= new_ids == layout.pad_id
        if has_ended.all():
            break
        sequence = torch.cat([sequence, new_ids[:, None]], dim=1)
        step_ids = sequence if cache is None else new_ids[:, None]
    return text_ids
