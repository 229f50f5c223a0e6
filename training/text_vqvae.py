"""Text VQ-DRAW beside a residual 1-D VQ-VAE of the same bits and the same cost: what share of held-out bytes comes back right.

    python training/text_vqvae.py DATA SECONDS

Both read spans of up to 8 bytes as 4 codes of 64, about one bit a byte each, and train for so many CPU seconds.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tok2img.data import load_captioned_images
from tok2img.recipes import TokenizerRecipe
from tok2img.reports import open_unseen
from tok2img.runs import build_text_model
from tok2img.text_reports import evaluate_text_tokenizer
from tokenizers_vq import VectorQuantizer, VQDrawForText
from tokenizers_vq.refiners import DilatedBlock

SETTINGS: dict[str, Any] = {
    "span_length": 8,
    "span_unit": "words",
    "num_stages": 4,
    "codebook_size": 64,
    "hidden_channels": 96,
    "dilations": [1, 2, 4, 8, 16],
    "aux_coeff": 0.001,
}
BATCH_SIZES = {"vqdraw": 16, "vqvae": 64}  # a step of the VQ-VAE costs a quarter as much
LEARNING_RATES = {"vqdraw": 4e-3, "vqvae": 2e-3}
CODE_DIM = 64


class TextVQVAE(nn.Module):
    """Dilated convolutions, a vector for each span, a residual quantizer, dilated convolutions.

    In training some spans stop after their first codes, so that every prefix decodes (SoundStream, Zeghidour et al. 2021, section III.C).
    """

    def __init__(self, like: VQDrawForText, width: int):
        super().__init__()
        length, dilations = like.config.max_length, like.config.dilations
        self.span_length = like.span_length
        self.embed = nn.Embedding(like.num_symbols, width)
        self.places = nn.ParameterList(torch.randn(length, width) * 0.02 for _ in range(2))
        self.encoder, self.decoder = (
            nn.ModuleList(DilatedBlock(1, width, each) for each in dilations) for _ in range(2)
        )
        self.gather = nn.Linear(self.span_length * width, CODE_DIM)
        self.stages = nn.ModuleList(
            VectorQuantizer(like.codebook_size, CODE_DIM) for _ in range(like.config.num_stages)
        )
        self.spread = nn.Linear(CODE_DIM, self.span_length * width)
        self.head = nn.Linear(width, like.num_symbols)

    def spans(self, symbols: Tensor) -> Tensor:
        """Symbols `b t` -> a vector for each span, `b s d`."""
        hidden = self.embed(symbols) + self.places[0]
        for block in self.encoder:
            hidden = block(hidden, 0)
        return self.gather(rearrange(hidden, "b (s t) c -> b s (t c)", t=self.span_length))

    def logits(self, spans: Tensor) -> Tensor:
        """Vectors of spans `b s d` -> logits `b t v`."""
        hidden = rearrange(self.spread(spans), "b s (t c) -> b (s t) c", t=self.span_length) + self.places[1]
        for block in self.decoder:
            hidden = block(hidden, 0)
        return self.head(hidden)

    def quantize(self, spans: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """After each stage: the sum of the vectors so far `b s d`, and the quantizer's loss."""
        total = torch.zeros_like(spans)
        for stage in self.stages:
            output = stage(spans - total.detach())
            total = total + output.quantized
            yield total, output.loss

    def forward(self, symbols: Tensor, live: Tensor) -> Tensor:
        """Symbols `b t` and which of them matter -> the loss."""
        spans = self.spans(symbols)
        totals, losses = zip(*self.quantize(spans), strict=True)
        # The gradient of a sum of stages is that of the first of them: straight through, once.
        sums = torch.stack([spans + (total - spans).detach() for total in totals])
        kept = torch.randint(len(totals), spans.shape[:1], device=spans.device)
        logits = self.logits(sums[kept, torch.arange(len(spans))])
        return F.cross_entropy(logits[live], symbols[live]) + torch.stack(losses).sum()

    @torch.no_grad()
    def byte_accuracy(self, symbols: Tensor, is_text: Tensor) -> list[float]:
        """Share of the bytes of symbols `b t` that are right after each stage."""
        seen = [self.logits(total).argmax(dim=2) for total, _ in self.quantize(self.spans(symbols))]
        return [(each == symbols)[is_text].float().mean().item() for each in seen]


def train(model: nn.Module, loss_of: Callable[[Tensor], Tensor], symbols: Tensor, *, name: str, seconds: float) -> int:
    """Adam with a cosine of the CPU time; the number of steps that fitted."""
    optimizer, started = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0), time.process_time()
    for step in count():
        share = (time.process_time() - started) / seconds
        if share >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[name] * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
        optimizer.zero_grad()
        loss_of(symbols[torch.randint(len(symbols), (BATCH_SIZES[name],))]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("count() has no end")


def main(data: str, seconds: float, *, max_texts: int = 1000) -> dict[str, Any]:
    """Train both, and print their curves."""
    torch.manual_seed(0)
    rows = load_captioned_images(data, with_images=False)
    texts = open_unseen(data, with_images=False, max_rows=max_texts)["caption"][:]
    draw = build_text_model(TokenizerRecipe(model=SETTINGS), rows)
    symbols, unseen = draw.symbols(rows["caption"][:]), draw.symbols(texts)
    draw.start_from_data(symbols[torch.randperm(len(symbols))[:4000]])
    steps = train(draw, lambda batch: draw(batch).loss, symbols, name="vqdraw", seconds=seconds)
    report = evaluate_text_tokenizer(draw.eval(), texts)
    curves = {"bits_per_byte": report["bits_per_byte"], "vqdraw": report["byte_accuracy"], "vqdraw_steps": steps}
    vae = TextVQVAE(draw, 2 * SETTINGS["hidden_channels"])
    steps = train(vae, lambda batch: vae(batch, draw.live(batch)), symbols, name="vqvae", seconds=seconds)
    curves |= {"vqvae": vae.eval().byte_accuracy(unseen, unseen != draw.end), "vqvae_steps": steps}
    print(json.dumps(curves, indent=2))
    return curves


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
