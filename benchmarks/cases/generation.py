"""Drawing codes from a prior: our loop, and stock `model.generate` with our logits processor, with and without guidance."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from tok2img.generation import LayoutLogitsProcessor, generate
from tok2img.layout import SequenceLayout
from tok2img.prior import build_prior
from tok2img.sampling import Sampling

from ..harness import Case, Comparison
from .prior import captions, prior_layout

GUIDANCE_SCALES = (1.0, 3.0)


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """All codes of a batch of pictures, drawn at temperature 1 among all options."""
    layout = prior_layout(codes_shared=True, tiny=tiny)
    prior = build_prior(layout, depth=1 if tiny else 4).eval()
    text_ids = captions(layout, 2 if tiny else 16)
    ways = {"ours": our_generate, "stock": stock_generate}
    cases = [
        Case(f"{name}, guidance {scale:g}", partial(way, prior, layout, text_ids, scale))
        for name, way in ways.items()
        for scale in GUIDANCE_SCALES
    ]
    yield Comparison(f"{layout.num_codes} codes, batch {len(text_ids)}", cases, "stock, guidance 1")


def our_generate(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, guidance_scale: float) -> Tensor:
    """Text `b t` -> codes `b n`, guidance as one doubled batch."""
    return generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=guidance_scale))


def stock_generate(prior: Any, layout: SequenceLayout, text_ids: Tensor, guidance_scale: float) -> Tensor:
    """Text `b t` -> codes `b n`; guidance, as transformers has it, runs the model twice a token."""
    prompt, empty = layout.prompt(text_ids), layout.prompt(layout.without_caption(len(text_ids)))
    output = prior.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=layout.num_codes,
        do_sample=True,
        top_k=0,
        guidance_scale=guidance_scale,
        negative_prompt_ids=empty,
        negative_prompt_attention_mask=torch.ones_like(empty),
        logits_processor=LogitsProcessorList([LayoutLogitsProcessor(layout)]),
    )
    return layout.image.ids_to_codes(output[:, layout.prompt_length :])
