"""Train a prior for a step: our loss over the head rows a position can use, stock `labels=`, and DALLE-pytorch.

CPU time relative to ours when codes share ids (Xeon at 2.0 GHz with AMX, one thread; medians of 5 rounds): stock 1.17,
DALLE-pytorch 1.53, ours compiled 0.88; ours in bfloat16 0.57, compiled 0.44, and 2.8 on a Xeon
that has no instructions for it.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tok2img.prior.float32_attention import attend_in_float32
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.tokenization.layout import SequenceLayout

from ..harness import Case, Comparison
from ..peer_priors import DEPTH, HEADS, WIDTH, dalle_loss, dalle_pytorch

BATCH_SIZE = 32


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare codes that share a range of ids (cells of a VQ-VAE) and codes with a range per position (stages of VQ-DRAW)."""
    batch_size = 2 if tiny else BATCH_SIZE
    for codes_shared in (True, False):
        layout = prior_layout(num_codes=4 if tiny else 64, codes_shared=codes_shared, tiny=tiny)
        prior = llama(layout, tiny=tiny).train()
        text_ids, codes = captions(layout, batch_size), image_codes(layout, batch_size)
        steps = {
            "ours": our_step(prior, layout, text_ids, codes),
            "ours, bfloat16": our_step(prior, layout, text_ids, codes, bfloat16=True),
            "stock labels=": TrainingStep(prior, partial(stock_loss, prior, layout, text_ids, codes)),
        }
        if not tiny:
            steps["ours, compiled"] = our_step(prior, layout, text_ids, codes, compile=True)
            steps["ours, bfloat16, compiled"] = our_step(prior, layout, text_ids, codes, bfloat16=True, compile=True)
        peer = dalle_pytorch(layout) if codes_shared and not tiny else None
        if peer is not None:
            steps["DALLE-pytorch"] = TrainingStep(peer.train(), partial(dalle_loss, peer, text_ids, codes))
        cases = [Case(name, step) for name, step in steps.items()]
        kind = "shared" if codes_shared else "own"
        title = f"batch {batch_size}, {layout.text_length} text + {layout.num_codes} codes, {kind} ids"
        yield Comparison(f"training step, {title} ({layout.vocab_size} in all)", cases, "ours")


class TrainingStep:
    """Training step of a plain loop, the same for all: loss, gradients, clipping, AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]):
        self.loss = loss
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def __call__(self) -> None:
        """Run one step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def our_step(
    prior: PreTrainedModel,
    layout: SequenceLayout,
    text_ids: Tensor,
    codes: Tensor,
    *,
    bfloat16: bool = False,
    compile: bool = False,
) -> TrainingStep:
    """Create a step for a copy of a prior, with settings of a recipe."""
    copied = deepcopy(prior)
    if bfloat16:
        attend_in_float32(copied)
    model = PriorWithLoss(copied, layout, caption_dropout=0.0, compile=compile).train()
    return TrainingStep(copied, partial(in_bfloat16 if bfloat16 else our_loss, model, text_ids, codes))


def prior_layout(*, num_codes: int, codes_shared: bool, tiny: bool) -> SequenceLayout:
    """Create a layout: 32 text tokens of 4096; codes of 1024 if they share ids, of 64 if each position has its own."""
    if tiny:
        return SequenceLayout(11, text_length=3, num_codes=num_codes, codebook_size=6, codes_shared=codes_shared)
    codebook_size = 1024 if codes_shared else 64
    return SequenceLayout(
        4096, text_length=32, num_codes=num_codes, codebook_size=codebook_size, codes_shared=codes_shared
    )


def llama(layout: SequenceLayout, *, tiny: bool) -> PreTrainedModel:
    """Build a Llama with the layers, heads and parameters of the other projects' priors."""
    if tiny:
        return build_prior(layout, architecture="llama", depth=1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "head_dim": WIDTH // HEADS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return build_prior(layout, architecture="llama", depth=DEPTH, **sizes, **heads)


def captions(layout: SequenceLayout, num: int) -> Tensor:
    """Create random text `num t`, the second half of it padding."""
    text_ids = layout.null_text_ids(num)
    written = text_ids[:, : (layout.text_length + 1) // 2]
    written.random_(layout.text_vocab_size, generator=torch.Generator().manual_seed(0))
    return text_ids


def image_codes(layout: SequenceLayout, num: int) -> Tensor:
    """Create random codes `num n`."""
    size, generator = (num, layout.num_codes), torch.Generator().manual_seed(1)
    return torch.randint(layout.codebook_size, size, generator=generator)


def our_loss(model: PriorWithLoss, text_ids: Tensor, codes: Tensor) -> Tensor:
    """Compute our loss of text `b t` and codes `b n`."""
    loss = model(text_ids, codes).loss
    assert loss is not None
    return loss


def in_bfloat16(model: PriorWithLoss, text_ids: Tensor, codes: Tensor) -> Tensor:
    """Compute our loss in bfloat16, which is faster on processors with instructions for it."""
    with torch.autocast("cpu", torch.bfloat16):
        return our_loss(model, text_ids, codes)


def stock_loss(prior: PreTrainedModel, layout: SequenceLayout, text_ids: Tensor, codes: Tensor) -> Tensor:
    """Compute the loss of transformers: one mean over all non-padding tokens, with the whole vocabulary at every position."""
    sequence = layout.sequence(text_ids, codes)
    return prior(sequence, labels=sequence.masked_fill(sequence == layout.pad_id, -100), use_cache=False).loss
