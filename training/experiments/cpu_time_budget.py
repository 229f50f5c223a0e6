"""Training loop with a budget of CPU seconds, for comparisons at equal cost."""

import math
import time
from itertools import count

import torch
from torch import Tensor, nn

from tokenizers_vq import DiscreteTokenizer

WARM_UP_STEPS = 50


def train_for(
    model: DiscreteTokenizer,
    rows: Tensor,
    *,
    seconds: float,
    learning_rate: float,
    batch_size: int,
    num_init_examples: int,
    bf16: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Train a tokenizer for a budget of CPU time, with a cosine schedule over that time.

    Args:
        model: The tokenizer.
        rows: Shuffled training data, `n ...`.
        seconds: Budget of CPU seconds, including the initialization from data.
        learning_rate: Peak learning rate.
        batch_size: Rows in a batch, sampled with replacement.
        num_init_examples: Number of the first rows that the tokenizer is initialized from.
        bf16: Use bfloat16 autocast.
        optimizer: Optimizer of the model's parameters; None: AdamW.

    Returns:
        The number of steps.
    """
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    started = time.process_time()
    model.train().init_from_data(rows[:num_init_examples])
    for step in count():
        share = (time.process_time() - started) / seconds
        if share >= 1:
            return step
        set_rate(optimizer, learning_rate, step=step, share=share)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(rows[torch.randint(len(rows), (batch_size,))]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("count() has no end")


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float, *, step: int, share: float) -> None:
    """Set the learning rate of a step: linear warmup, then a cosine over `share`, the fraction of the budget used so far."""
    warm_up = min(1, (step + 1) / WARM_UP_STEPS)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * share))
