"""Ids in, picture codes out: sampling from a prior. Knows no text and no pixels.

The prior's own code runs the layers with a key-value cache; only the head rows of each position's codes are computed. A picture depends
on its prompt, `seed` and index alone, never on the batch it is drawn in: every picture has a stream of its own, one uniform number a
code, turned into a code by the inverse of the cumulative distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from .layout import SequenceLayout
from .prior import segment_logits


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn.

    Attributes:
        guidance_scale: 1 follows the caption as trained; above, logits move on by that much from those without a caption
            (Ho & Salimans 2022, as in Gafni et al. 2022 for tokens).
        temperature: 0 takes the likeliest code.
        top_k: draw among so many of the likeliest codes; 0: all.
        top_p: draw among the likeliest codes that together have this probability.

    Raises:
        ValueError: for a value out of range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_k"):
            if not np.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and not above 1, got {self.top_p}")
        if self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be a whole number of codes, got {self.top_k}")


@torch.no_grad()
def generate(
    prior: PreTrainedModel,
    layout: SequenceLayout,
    text_ids: Tensor,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    negative_text_ids: Tensor | None = None,
    use_cache: bool = True,
    on_code: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw a picture's codes for every prompt, `b t` -> `b n` int64.

    Args:
        text_ids: text `b t` as the processor makes it; left as it is.
        indices: the number of each picture in its stream of `seed`, `0..b-1` when left out.
        negative_text_ids: what guidance leads away from, `b t`; the empty caption when left out.
        use_cache: False computes every step from the start, which gives the same codes slower.
        on_code: called after each code with its position and all codes so far, `b n`.
    """
    sampling = sampling or Sampling()
    for name, given in (("indices", indices), ("negative_text_ids", negative_text_ids)):
        if given is not None and len(given) != len(text_ids):
            raise ValueError(f"got {len(given)} {name} for {len(text_ids)} prompts")
    prompts = [layout.prompt(text_ids.to(prior.device))]
    if sampling.guidance_scale != 1:
        empty = layout.without_caption(len(text_ids)) if negative_text_ids is None else negative_text_ids
        prompts.append(layout.prompt(empty.to(prior.device)))
    sequence = torch.cat(prompts)
    uniforms = uniform_streams(seed, range(len(text_ids)) if indices is None else indices, layout.num_codes)
    cache = DynamicCache(config=prior.config) if use_cache else None
    codes = torch.empty(len(text_ids), layout.num_codes, dtype=torch.int64, device=prior.device)
    step_ids = sequence
    for position, first in enumerate(layout.image.position_offsets().tolist()):
        hidden = next_state(prior, step_ids, cache)
        logits = segment_logits(prior, hidden, first, first + layout.codebook_size).float()
        code = draw_codes(guided(logits, sampling.guidance_scale), uniforms[:, position], sampling)
        codes[:, position] = code
        if on_code is not None:
            on_code(position, codes)
        new_ids = (code + first).repeat(len(prompts))[:, None]
        sequence = torch.cat([sequence, new_ids], dim=1)
        step_ids = sequence if cache is None else new_ids
    return codes


def next_state(prior: PreTrainedModel, input_ids: Tensor, cache: DynamicCache | None) -> Tensor:
    """The state `b d` under the head after these ids `b s` (and those in the cache)."""
    hidden = prior.base_model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    return hidden[:, -1]


def guided(logits: Tensor, scale: float) -> Tensor:
    """Rows with caption above rows without, `2b k` -> `b k`: without + scale x (with - without). Unchanged at scale 1."""
    if scale == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def uniform_streams(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """One stream of uniform numbers for each (seed, index), `b n` float64: Philox, a counter-based generator, keyed by both."""
    keys = [np.array([seed % 2**64, index], dtype=np.uint64) for index in indices]
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=key)).random(length) for key in keys]))


def draw_codes(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Logits `b k` and uniforms `b` -> codes `b`, by the inverse of the cumulative distribution."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = keep_likeliest((logits.double() / sampling.temperature).softmax(dim=-1), sampling)
    cumulative = probabilities.cumsum(dim=-1)
    targets = uniforms.to(logits.device)[:, None] * cumulative[:, -1:]
    # A code of probability zero is never the first whose cumulative share exceeds the target.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def keep_likeliest(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero for codes outside top-k and top-p (Holtzman et al. 2020), `b k` -> `b k`; the likeliest always stays."""
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = before < sampling.top_p * ordered.sum(dim=-1, keepdim=True)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered * keep)


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
