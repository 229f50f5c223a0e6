"""Log-likelihood of image codes under a prior."""

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from ..prior.model import code_logits, trunk
from ..tokenization.layout import SequenceLayout

BATCH_SIZE = 64


@torch.inference_mode()
def pointwise_mutual_information(
    prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor
) -> Tensor:
    """log p(codes | caption) - log p(codes | no caption): text `b t` and codes `b n` -> `b` float64, in nats.

    What the caption says about the image, by the prior alone; how likely the image is anyway cancels out.
    """
    scores = []
    for text, some in zip(text_ids.split(BATCH_SIZE), codes.split(BATCH_SIZE), strict=True):
        blind = layout.null_text_ids(len(text), text.device)
        informed, uninformed = log_likelihood(
            prior, layout, torch.cat([text.long(), blind]), torch.cat([some, some])
        ).chunk(2)
        scores.append(informed - uninformed)
    return torch.cat(scores)


def log_likelihood(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor) -> Tensor:
    """log p(codes | text) among the codes of each position, in one pass: `b t` and `b n` -> `b` float64, on the CPU."""
    sequence = layout.sequence(text_ids.to(prior.device), codes.to(prior.device))
    hidden = trunk(prior, sequence[:, :-1])[:, layout.prompt_length - 1 :]
    log_probabilities = code_logits(prior, hidden, layout.image).double().log_softmax(dim=-1)
    return log_probabilities.gather(-1, codes.long().to(prior.device)[..., None]).sum(dim=(1, 2)).cpu()


def argmax_per_group(scores: Tensor, num: int) -> Tensor:
    """Row of the best of every `num` scores in turn, `(b num)` -> `b`; the first of equals."""
    if not scores.isfinite().all():
        raise ValueError("a ranker gave a score that is not finite")
    return rearrange(scores, "(b num) -> b num", num=num).argmax(dim=1) + num * torch.arange(len(scores) // num)
