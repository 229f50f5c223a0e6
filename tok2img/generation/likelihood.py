"""Log-likelihood of image codes under a prior."""

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from ..prior.model import code_logits, last_hidden_state
from ..tokenization.layout import SequenceLayout

BATCH_SIZE = 64


@torch.inference_mode()
def pointwise_mutual_information(
    prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor
) -> Tensor:
    """Compute log p(codes | caption) - log p(codes | empty caption).

    This measures what a caption says about an image. The likelihood of the image itself, by which plain
    images would always win, cancels.

    Args:
        prior: The prior.
        layout: Its layout.
        text_ids: Text ids, `b t`.
        codes: Image codes, `b n`.

    Returns:
        Pointwise mutual information in nats, `b` float64 on the CPU.
    """
    scores = []
    for text, batch_codes in zip(text_ids.split(BATCH_SIZE), codes.split(BATCH_SIZE), strict=True):
        empty = layout.null_text_ids(len(text), text.device)
        conditional, unconditional = log_likelihood(
            prior, layout, torch.cat([text.long(), empty]), torch.cat([batch_codes, batch_codes])
        ).chunk(2)
        scores.append(conditional - unconditional)
    return torch.cat(scores)


def log_likelihood(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor) -> Tensor:
    """Compute log p(codes | text) in one forward pass.

    Each position is normalized over its own codes, as in sampling.

    Args:
        prior: The prior.
        layout: Its layout.
        text_ids: Text ids, `b t`.
        codes: Image codes, `b n`.

    Returns:
        Log-likelihoods in nats, `b` float64 on the CPU.
    """
    sequence = layout.sequence(text_ids.to(prior.device), codes.to(prior.device))
    hidden = last_hidden_state(prior, sequence[:, :-1])[:, layout.prompt_length - 1 :]
    log_probabilities = code_logits(prior, hidden, layout.image).double().log_softmax(dim=-1)
    return log_probabilities.gather(-1, codes.long().to(prior.device)[..., None]).sum(dim=(1, 2)).cpu()


def argmax_per_group(scores: Tensor, group_size: int) -> Tensor:
    """Return the row of the highest score in each group of adjacent rows.

    Args:
        scores: Scores, `(b g)`.
        group_size: Rows per group, `g`.

    Returns:
        Row numbers, `b`; the first of equal scores.

    Raises:
        ValueError: If a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("Expected finite scores, got one that is not finite.")
    offsets = group_size * torch.arange(len(scores) // group_size)
    return rearrange(scores, "(b g) -> b g", g=group_size).argmax(dim=1) + offsets
