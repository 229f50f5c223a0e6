"""Generate codes with a prior: our loop, stock `model.generate` with our logits processor, and other projects.

CPU time relative to ours (Xeon at 2.0 GHz, one thread, batch 16; medians of 3 rounds, next to other work):

| | 64 codes | 256 codes |
| --- | ---: | ---: |
| ours, guidance 3 | 1.60 | 1.57 |
| stock `generate` | 1.54 | 1.72 |
| DALLE-pytorch, cache fixed | 1.68 | 2.02 |
| minDALL-E | 1.14 | 2.21 |
| LlamaGen | 1.33 | 2.55 |
| DALLE-pytorch as shipped (one run) | 20.0 | 48.7 |
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from tok2img.generation.generate import LayoutLogitsProcessor, generate
from tok2img.generation.sampling import Sampling
from tok2img.tokenization.layout import SequenceLayout

from ..harness import Case, Comparison
from ..peer_priors import dalle_draws, llamagen_draws, min_dalle_draws
from .prior import captions, llama, prior_layout

GUIDANCE_SCALES = (1.0, 3.0)


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare sampling at temperature 1 among all codes.

    Guidance is ours alone, because that of the others does not work.
    """
    for num_codes in (4,) if tiny else (64, 256):
        layout = prior_layout(num_codes=num_codes, codes_shared=True, tiny=tiny)
        prior = llama(layout, tiny=tiny).eval()
        text_ids = captions(layout, 2 if tiny else 16)
        ways = {"ours": our_generate, "stock": stock_generate}
        cases = [
            Case(f"{name}, guidance {scale:g}", partial(way, prior, layout, text_ids, scale))
            for name, way in ways.items()
            for scale in GUIDANCE_SCALES
        ]
        if not tiny:
            cases += peer_cases(layout, text_ids)
        yield Comparison(f"{num_codes} codes, batch {len(text_ids)}", cases, "ours, guidance 1")


def peer_cases(layout: SequenceLayout, text_ids: Tensor) -> list[Case]:
    """Return the samplers of the other projects that are installed; without a cache they take minutes."""
    draws = {}
    for peer in (dalle_draws, min_dalle_draws, llamagen_draws):
        draws |= peer(layout, text_ids)
    return [Case(name, draw, slow="as shipped" in name) for name, draw in draws.items()]


def our_generate(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, guidance_scale: float) -> Tensor:
    """Generate codes `b n` from text `b t`, with guidance as one doubled batch."""
    return generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=guidance_scale))


def stock_generate(prior: Any, layout: SequenceLayout, text_ids: Tensor, guidance_scale: float) -> Tensor:
    """Generate codes `b n` from text `b t`; the guidance of transformers runs the model twice per token."""
    prompt, empty = layout.prompt(text_ids), layout.prompt(layout.null_text_ids(len(text_ids)))
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
