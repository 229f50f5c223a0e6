"""A training step of the prior: our loss, which multiplies only the head rows a position can use, and stock `labels=`."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tok2img.layout import SequenceLayout
from tok2img.prior import build_prior
from tok2img.prior_loss import PriorWithLoss

from ..harness import Case, Comparison


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Codes that share a range of ids (cells of a VQ-VAE), and a range for each position (stages of VQ-DRAW)."""
    batch_size = 2 if tiny else 16
    for codes_shared in (True, False):
        layout = prior_layout(codes_shared=codes_shared, tiny=tiny)
        prior = build_prior(layout, depth=1 if tiny else 4).train()
        text_ids, codes = captions(layout, batch_size), image_codes(layout, batch_size)
        ours = PriorWithLoss(prior, layout, caption_dropout=0.0)
        cases = [
            Case("ours", partial(training_step, ours, text_ids, codes), prior.zero_grad),
            Case("stock labels=", partial(stock_step, prior, layout, text_ids, codes), prior.zero_grad),
        ]
        kind = "shared" if codes_shared else "own"
        title = f"batch {batch_size}, {layout.text_length} text + {layout.num_codes} codes, {kind} ids"
        yield Comparison(f"training step, {title} ({layout.vocab_size} in all)", cases, "stock labels=")


def prior_layout(*, codes_shared: bool, tiny: bool) -> SequenceLayout:
    """32 text tokens of 4096 and 64 codes: of 512 where they share ids, of 64 where each position has its own."""
    if tiny:
        return SequenceLayout(11, text_length=3, num_codes=4, codebook_size=6, codes_shared=codes_shared)
    codebook_size = 512 if codes_shared else 64
    return SequenceLayout(4096, text_length=32, num_codes=64, codebook_size=codebook_size, codes_shared=codes_shared)


def captions(layout: SequenceLayout, num: int) -> Tensor:
    """Random text `num t`, the second half of it padding."""
    text_ids = layout.without_caption(num)
    written = text_ids[:, : (layout.text_length + 1) // 2]
    written.random_(layout.text_vocab_size, generator=torch.Generator().manual_seed(0))
    return text_ids


def image_codes(layout: SequenceLayout, num: int) -> Tensor:
    """Random codes `num n`."""
    size, generator = (num, layout.num_codes), torch.Generator().manual_seed(1)
    return torch.randint(layout.codebook_size, size, generator=generator)


def training_step(model: PriorWithLoss, text_ids: Tensor, codes: Tensor) -> None:
    """Forward and back; what an optimizer does is the same for all."""
    model(text_ids, codes).loss.backward()


def stock_step(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor) -> None:
    """As transformers does it: one mean over the tokens that are not padding, with the whole vocabulary everywhere."""
    sequence = layout.sequence(text_ids, codes)
    prior(sequence, labels=sequence.masked_fill(sequence == layout.pad_id, -100), use_cache=False).loss.backward()
