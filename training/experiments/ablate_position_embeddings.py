"""Ablate the position embeddings of a prior.

    python training/experiments/ablate_position_embeddings.py TOKENS STEPS [SEED ...]

TOKENS is a folder of `tok2img tokenize`. Trains four priors on the same batches for each seed: the
default one without and
with `AxialPositionEmbeddings`, one with ids of its own for every position, and a GPT-2 of the same size, which learns
an embedding for each position. Prints the held-out loss of a code in nats, halfway and at the end,
and CPU seconds per step.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from cpu_time_budget import set_rate
from torch import Tensor, nn

from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.prior.position_embeddings import build_position_embeddings
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.token_dataset import load_tokens

BATCH_SIZE, DEPTH, LEARNING_RATE, NUM_HELD_OUT = 64, 3, 1e-3, 1000

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "axial embeddings": {"with_places": True},
    "own ids": {"with_position_specific_ids": True},
    "GPT-2": {"architecture": "gpt2"},
}


def train(
    tokens: Any,
    layout: SequenceLayout,
    *,
    num_steps: int,
    seed: int,
    architecture: str = "qwen3",
    with_places: bool = False,
    with_position_specific_ids: bool = False,
) -> Iterator[float]:
    """Train one prior; yield its held-out losses, and at the end the CPU seconds per step."""
    layout = layout.with_position_specific_ids() if with_position_specific_ids else layout
    prior = build_prior(layout, architecture=architecture, depth=DEPTH, seed=seed)
    places = build_position_embeddings(prior, layout) if with_places else None
    model = PriorWithLoss(prior, layout, caption_dropout=0.1, position_embeddings=places)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    generator, rows = torch.Generator().manual_seed(seed), tokens[:]
    seconds = 0.0
    for step in range(num_steps):
        started = time.process_time()
        chosen = NUM_HELD_OUT + torch.randint(len(tokens) - NUM_HELD_OUT, (BATCH_SIZE,), generator=generator)
        (batch,) = model.prepare_step(
            [{name: rows[name][chosen] for name in rows}], lambda num: torch.rand(num, generator=generator)
        )
        set_rate(optimizer, LEARNING_RATE, step=step, share=step / num_steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - started
        if step + 1 in (num_steps // 2, num_steps):
            yield held_out(model, rows)
    yield seconds / num_steps


@torch.no_grad()
def held_out(model: PriorWithLoss, rows: dict[str, Tensor]) -> float:
    """Return the mean loss of a code of the held-out rows, in nats."""
    model.eval()
    parts = [
        {name: column[first : first + 250] for name, column in rows.items()} for first in range(0, NUM_HELD_OUT, 250)
    ]
    losses = [model(**part).metrics["image_loss"] for part in parts]
    model.train()
    return torch.stack(losses).mean().item()


def main(folder: str, num_steps: int, seeds: list[int]) -> None:
    """Train every kind of prior with every seed."""
    tokens, processor = load_tokens(folder)
    tokens = tokens.shuffle(seed=0).with_format("torch")
    for seed in seeds or [0]:
        for name, settings in KINDS.items():
            losses = train(tokens, processor.layout, num_steps=num_steps, seed=seed, **settings)
            print(f"seed {seed}  {name:15}  {'  '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), list(map(int, sys.argv[3:])))
