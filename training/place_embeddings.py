"""Does a prior learn more where it is told the row and column, or the stage, of the code that comes next?

    python training/place_embeddings.py TOKENS STEPS [SEED ...]

TOKENS is a folder of `tok2img tokenize`. For each seed trains the default prior without and with embeddings of places, learned and added
to those of the ids, and GPT-2 of the same size, which learns a vector for each position, all on the same batches; prints the held-out
loss of a code, in nats, halfway and at the end. Where the number of codes is no square they count as stages. The embeddings cost no time
to speak of, so equal steps are equal cost.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from timed import set_rate
from torch import Tensor, nn

from tok2img.prior import build_prior
from tok2img.prior_loss import PriorWithLoss
from tok2img.tokenized import load_tokens

BATCH_SIZE, DEPTH, LEARNING_RATE, NUM_HELD_OUT = 64, 3, 1e-3, 1000

KINDS: dict[str, dict[str, Any]] = {
    "without places": {},
    "with places": {"with_places": True},
    "GPT-2": {"architecture": "gpt2"},
}


class PlaceEmbeddings(nn.Module):
    """Vectors of rows and columns, added to what a prior reads where the next id is a code."""

    def __init__(self, num_codes: int, prompt_length: int, width: int):
        super().__init__()
        side = math.isqrt(num_codes)
        shape = (side, side) if side * side == num_codes else (1, num_codes)
        self.tables = nn.ParameterList(nn.Parameter(0.02 * torch.randn(size, width)) for size in shape)
        self.first, self.shape = prompt_length - 1, shape

    def forward(self, _: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        """As a hook of the prior's embeddings: `b s d` -> `b s d`."""
        rows, columns = self.tables
        places = (rows[:, None] + columns).flatten(0, 1)[: embeddings.shape[1] - self.first]
        return torch.cat([embeddings[:, : self.first], embeddings[:, self.first :] + places], dim=1)


def train(
    tokens: Any, layout: Any, *, num_steps: int, seed: int, architecture: str = "qwen3", with_places: bool = False
) -> Iterator[float]:
    """Train one prior; its held-out losses."""
    prior = build_prior(layout, architecture=architecture, depth=DEPTH, seed=seed)
    model = PriorWithLoss(prior, layout, caption_dropout=0.1)
    parameters = list(model.parameters())
    if with_places:
        places = PlaceEmbeddings(layout.num_codes, layout.prompt_length, prior.config.hidden_size)
        prior.get_input_embeddings().register_forward_hook(places)
        parameters += places.parameters()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    generator, rows = torch.Generator().manual_seed(seed), tokens[:]
    for step in range(num_steps):
        chosen = NUM_HELD_OUT + torch.randint(len(tokens) - NUM_HELD_OUT, (BATCH_SIZE,), generator=generator)
        (batch,) = model.prepare(
            [{name: rows[name][chosen] for name in rows}], lambda num: torch.rand(num, generator=generator)
        )
        set_rate(optimizer, LEARNING_RATE, step=step, share=step / num_steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step + 1 in (num_steps // 2, num_steps):
            yield held_out(model, rows)


@torch.no_grad()
def held_out(model: PriorWithLoss, rows: dict[str, Tensor]) -> float:
    """Mean loss of a code of the first rows, in nats."""
    model.eval()
    parts = [
        {name: column[first : first + 250] for name, column in rows.items()} for first in range(0, NUM_HELD_OUT, 250)
    ]
    losses = [model(**part).metrics["image_loss"] for part in parts]
    model.train()
    return torch.stack(losses).mean().item()


def main(folder: str, num_steps: int, seeds: list[int]) -> None:
    """All kinds, seed by seed."""
    tokens, processor = load_tokens(folder)
    tokens = tokens.shuffle(seed=0).with_format("torch")
    for seed in seeds or [0]:
        for name, settings in KINDS.items():
            losses = train(tokens, processor.layout, num_steps=num_steps, seed=seed, **settings)
            print(f"seed {seed}  {name:15}  {'  '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), list(map(int, sys.argv[3:])))
