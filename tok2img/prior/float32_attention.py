"""Attention in float32 for priors that train in bfloat16 on a CPU, whose kernel for the way back is slow in bfloat16.

A step of attention, there and back, 32 x 8 heads x 96 positions of 32 numbers, one thread of a Xeon with bfloat16 instructions: 125 ms in
bfloat16, 43 in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "tok2img_float32"


def float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """torch's attention of `b h s d` in float32, whatever autocast says -> `b s h d` of the type that came, as "sdpa" of transformers."""
    with torch.autocast(query.device.type, enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **settings
        )
    return attended.to(value.dtype), None


AttentionInterface.register(FLOAT32, float32_attention)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


def attend_in_float32(prior: PreTrainedModel) -> None:
    """Have a prior that uses torch's attention do so in float32; one that uses another is left alone. Nothing of it is saved."""
    if prior.config._attn_implementation == "sdpa":
        prior.set_attn_implementation(FLOAT32)
