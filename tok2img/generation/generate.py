"""Generate image codes from text ids with a prior.

Ids go in and codes come out; text and pixels are the pipelines' business. The prior's own code runs the
layers with a key-value cache, and only the head rows of each position's codes are computed. An image depends
on its prompt, `seed` and index alone, never on its batch.
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
from .sampling import Sampling, apply_guidance, sample_codes, uniform_noise

CACHE_BYTES = 2**30
# Larger batches gain little. Measured: 18.1, 6.2, 4.6 and 3.1 ms per image in batches of 16, 64, 128 and 256
# (49 codes, a prior of two layers, one core).
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
    init_codes: Tensor | None = None,
    keep_mask: Tensor | None = None,
    use_cache: bool = True,
    compile: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample the image codes of every prompt.

    Args:
        prior: A causal language model that fits the layout.
        layout: The layout of its sequences.
        text_ids: Text ids from the processor, `b t`.
        sampling: Sampling settings; the defaults of `Sampling` if None.
        seed: Seed of the noise.
        indices: Index of each image in the noise of `seed`, `b`; `0..b-1` by default.
        uniforms: Noise in [0, 1) to use instead of that of `seed` and `indices`, `b n`.
        negative_text_ids: Text that guidance leads away from, `b t`; the empty caption by default.
        init_codes: Codes of images to complete or to vary, `b n`. Goes together with `keep_mask`.
        keep_mask: True where the codes of `init_codes` are kept, `n`. The other codes are sampled, each from
            the codes before it alone. Adjacent kept codes cost one forward pass together.
        use_cache: If False, compute every step from the start, which gives the same codes more slowly.
        compile: Run the layers through `torch.compile`. Meant for GPUs: compilation takes long, and happens
            again for every batch size.
        callback: Called after each sampled code with its position and all codes so far, `b n`.

    Returns:
        Image codes, `b n` int64.

    Raises:
        ValueError: If the inputs do not fit each other or the layout, or `init_codes` are out of range.

    Example:
        >>> import torch
        >>> from tok2img import SequenceLayout, build_prior, generate
        >>> layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
        >>> prior = build_prior(layout, depth=1)
        >>> generate(prior, layout, torch.tensor([[1, 5, 10], [3, 3, 0]]), seed=0).shape
        torch.Size([2, 4])
    """
    sampling = sampling or Sampling()
    cache = make_cache(prior, layout.sequence_length, use_cache=use_cache, compiled=compile)
    num = len(text_ids)
    if not num:
        raise ValueError("Expected at least one prompt, got no prompts.")
    for name, rows in {"indices": indices, "uniforms": uniforms, "negative_text_ids": negative_text_ids}.items():
        if rows is not None and len(rows) != num:
            raise ValueError(f"Expected one row of {name} per prompt, got {len(rows)} {name} for {num} prompts.")
    is_kept, codes = initial_codes(layout, num, init_codes, keep_mask)
    codes = codes.to(prior.device)
    scales = sampling.guidance_schedule(layout.num_codes)
    is_guided = any(scale != 1 for scale in scales)
    if uniforms is None:
        uniforms = uniform_noise(seed, range(num) if indices is None else indices, layout.num_codes)
    pending_ids = with_unconditional(layout, text_ids, negative_text_ids) if is_guided else layout.prompt(text_ids)
    pending_ids = pending_ids.to(prior.device)
    for position, first in enumerate(layout.image.position_offsets().tolist()):
        if not is_kept[position]:
            hidden = next_hidden_state(prior, pending_ids, cache, compiled=compile)
            logits = segment_logits(prior, hidden, first, first + layout.codebook_size).float()
            logits = apply_guidance(logits, scales[position]) if is_guided else logits
            codes[:, position] = sample_codes(logits, uniforms[:, position], sampling)
            if callback is not None:
                callback(position, codes)
        # With guidance the unconditional half of the batch reads the same codes.
        new_ids = (codes[:, position] + first).repeat(1 + is_guided)[:, None]
        # After a kept code nothing was computed, so its predecessors are still to be read.
        is_in_cache = cache is not None and not is_kept[position]
        pending_ids = new_ids if is_in_cache else torch.cat([pending_ids, new_ids], dim=1)
    return codes


def with_unconditional(layout: SequenceLayout, text_ids: Tensor, negative_text_ids: Tensor | None) -> Tensor:
    """Stack conditional prompts above unconditional ones, for guidance in one batch.

    Args:
        layout: The layout of the sequences.
        text_ids: Text ids, `b t`.
        negative_text_ids: Text ids that guidance leads away from, `b t`; the empty caption if None.

    Returns:
        Prompts, `(2 b) s`.
    """
    negative = layout.null_text_ids(len(text_ids)) if negative_text_ids is None else negative_text_ids
    return torch.cat([layout.prompt(each.to(text_ids.device)) for each in (text_ids, negative)])


def initial_codes(
    layout: SequenceLayout, num: int, init_codes: Tensor | None, keep_mask: Tensor | None
) -> tuple[list[bool], Tensor]:
    """Validate the codes to keep and copy them.

    Args:
        layout: The layout of the sequences.
        num: Number of prompts, `b`.
        init_codes: Codes of images, `b n`, or None.
        keep_mask: Booleans `n`, or None.

    Returns:
        For each of the `n` positions whether it is kept, and the codes before sampling, `b n`.

    Raises:
        ValueError: If only one is given, or shape, dtype or range are wrong.
    """
    if init_codes is None and keep_mask is None:
        return [False] * layout.num_codes, torch.zeros(num, layout.num_codes, dtype=torch.int64)
    if init_codes is None or keep_mask is None:
        raise ValueError("init_codes and keep_mask go together, got one of them")
    if (
        init_codes.shape != (num, layout.num_codes)
        or keep_mask.shape != (layout.num_codes,)
        or keep_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"Expected init_codes `{num} {layout.num_codes}` and a keep_mask of booleans `{layout.num_codes}`,"
            f" got {tuple(init_codes.shape)} and {keep_mask.dtype} {tuple(keep_mask.shape)}."
        )
    is_invalid = (init_codes < 0) | (init_codes >= layout.codebook_size)
    if is_invalid.any():
        raise ValueError(
            f"Expected init_codes in 0..{layout.codebook_size - 1}, got {init_codes[is_invalid][0].item()}."
        )
    return keep_mask.tolist(), init_codes.long().clone()


def next_hidden_state(
    prior: PreTrainedModel, input_ids: Tensor, cache: Cache | None, *, compiled: bool = False
) -> Tensor:
    """Compute the hidden state that predicts the next id.

    Args:
        prior: The prior.
        input_ids: Ids that follow those in the cache, `b s`.
        cache: The cache, which is extended; None if `input_ids` is the whole sequence.
        compiled: Run steps of one id through `torch.compile`. Prompts, of many lengths, stay eager.

    Returns:
        The last hidden state under the head, `b d`.
    """
    layers = compile_base_model(prior.base_model) if compiled and input_ids.shape[1] == 1 else prior.base_model
    return layers(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state[:, -1]


def max_batch_size(prior: PreTrainedModel, layout: SequenceLayout, *, guidance: bool) -> int:
    """Return the number of images to generate together: their keys and values take at most 1 GiB.

    Args:
        prior: The prior.
        layout: Its layout.
        guidance: Whether guidance doubles the batch.
    """
    config: Any = prior.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_values = 2 * config.num_hidden_layers * num_heads * head_size * layout.sequence_length
    bytes_per_image = num_values * prior.dtype.itemsize * (2 if guidance else 1)
    return max(1, min(MAX_BATCH, CACHE_BYTES // bytes_per_image))


class LayoutLogitsProcessor(LogitsProcessor):
    """Logits processor that keeps stock `model.generate` within the ids a layout allows at each position.

    Args:
        layout: The layout of the sequences; generation starts after its prompt.

    Example:
        >>> import torch
        >>> from tok2img import LayoutLogitsProcessor, SequenceLayout
        >>> layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
        >>> prompt = layout.prompt(torch.tensor([[1, 5, 10]]))
        >>> scores = LayoutLogitsProcessor(layout)(prompt, torch.zeros(1, layout.vocab_size))
        >>> scores.isfinite().sum().item()
        6
    """

    def __init__(self, layout: SequenceLayout):
        self.layout, self.offsets = layout, layout.image.position_offsets().tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of ids that are not allowed to minus infinity.

        Args:
            input_ids: Ids so far, `b s`.
            scores: Scores of the next id, `b v`.

        Returns:
            Masked scores, `b v`.
        """
        first = self.offsets[input_ids.shape[1] - self.layout.prompt_length]
        allowed = slice(first, first + self.layout.codebook_size)
        masked = torch.full_like(scores, float("-inf"))
        masked[:, allowed] = scores[:, allowed]
        return masked


@lru_cache(maxsize=1)
def compile_base_model(base_model: nn.Module) -> Callable[..., Any]:
    """Compile a prior without its head, once: takes half a minute on a CPU.

    On CUDA this mode replays graphs instead of launching kernels one by one (not measured).
    """
    return torch.compile(base_model, mode="reduce-overhead")
