"""Estimate what a training run costs, from a few real steps on a handful of its examples.

Nothing is written where the run would write.
"""

import resource
import sys
import time
from dataclasses import dataclass, fields, replace
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq.model_with_loss import get_inner_model

from ..tokenization.map_function import TokenizeBatch, token_table
from ..trainer.trainer import Trainer
from .build_prior import build_prior_with_loss
from .build_tokenizer import TEXT_TOKENIZERS, build_model
from .config import PriorRecipe, RunSettings, TokenizerRecipe, require
from .train_prior import load_training_source
from .train_tokenizer import training_dataset
from .training_run import load_data, training_arguments

NUM_STEPS = 5
MAX_ROWS = 64  # examples that are read; a larger batch repeats them


@dataclass
class Estimate:
    """Cost of a training run.

    Attributes:
        parameters: Number of parameters of the model and its loss.
        trained_parameters: Number of those that are trained.
        weight_bytes: Bytes of all parameters.
        optimizer_bytes: Bytes of gradients and moments.
        peak_bytes: Largest memory so far: of the process on a CPU, of tensors on a GPU.
        seconds_per_step: Median of the real steps after the first.
        num_steps: Steps of the whole run.
        tokenize_seconds: Time to make the tokens first. 0 = they exist.
    """

    parameters: int
    trained_parameters: int
    weight_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    seconds_per_step: float
    num_steps: int
    tokenize_seconds: float = 0.0

    def __str__(self) -> str:
        holder = "tensors on the GPU" if torch.cuda.is_available() else "the process"
        lines = {
            "parameters": f"{self.parameters:,}, {self.trained_parameters:,} of them trained",
            "weights": format_megabytes(self.weight_bytes),
            "optimizer": f"{format_megabytes(self.optimizer_bytes)}: gradients and moments",
            "memory": f"{format_megabytes(self.peak_bytes)} at most, {holder}",
            "tokenizing": format_duration(self.tokenize_seconds) if self.tokenize_seconds else "done before",
            "a step": f"{self.seconds_per_step:.3g} s",
            f"{self.num_steps} steps": f"{format_duration(self.seconds_per_step * self.num_steps)}; "
            "held-out losses and samples come on top",
        }
        return "\n".join(f"{name:<12}  {value}" for name, value in lines.items())


def estimate_prior(recipe: PriorRecipe) -> Estimate:
    """Estimate the cost of `train_prior`: tokenize a few examples and train on them. Raises the same errors."""
    source, processor = load_training_source(recipe)
    model, _ = build_prior_with_loss(recipe, processor)
    num_rows, seconds = min(MAX_ROWS, len(source)), 0.0
    if isinstance(source, Dataset):
        few = source.select(range(num_rows))
    else:
        started = time.perf_counter()
        tokens = TokenizeBatch(processor)(next(source.batches(range(num_rows), num_rows)))
        seconds = (time.perf_counter() - started) / num_rows * len(source)
        few = token_table(processor.layout, **tokens)
    rows = rows_of_one_step(few, recipe).with_format("torch")
    estimate = measure_steps(model, rows, replace(recipe, torch_compile=False))
    estimate.tokenize_seconds = seconds
    return estimate


def estimate_tokenizer(recipe: TokenizerRecipe) -> Estimate:
    """Estimate the cost of `train_tokenizer` in the same way. A BPE, which takes no steps, is a ValueError."""
    require(recipe, "data")
    is_text = recipe.tokenizer in TEXT_TOKENIZERS
    if recipe.tokenizer == "bpe":
        raise ValueError("a BPE is counted in one pass, not trained in steps: run it without --dry-run")
    rows = load_data(recipe, with_captions=is_text, with_images=not is_text)
    model = build_model(recipe, rows)
    return measure_steps(model, training_dataset(get_inner_model(model), rows_of_one_step(rows, recipe)), recipe)


def rows_of_one_step(rows: Dataset, recipe: RunSettings) -> Dataset:
    """Return as many examples as one step takes, repeating the first `MAX_ROWS`."""
    num, few = recipe.batch_size * recipe.gradient_accumulation_steps, min(MAX_ROWS, len(rows))
    return rows.select([row % few for row in range(num)])


def measure_steps(model: nn.Module, rows: Any, recipe: RunSettings) -> Estimate:
    """Train for `NUM_STEPS` steps as the recipe says, and measure time and memory."""
    clock = StepClock()
    with TemporaryDirectory() as folder:
        changed = {
            "out": folder,
            "max_steps": NUM_STEPS,
            "eval_steps": 0,
            "save_steps": 0,
            "logging_steps": NUM_STEPS + 1,
            "report_to": "none",
        }
        kept = {each.name: getattr(recipe, each.name) for each in fields(RunSettings)}
        args = training_arguments(RunSettings(**kept | changed))
        trainer = Trainer(model, args, train_dataset=rows, optimizer=recipe.optimizer)
        trainer.add_callback(clock)
        trainer.remove_callback(trainer.graceful_shutdown)  # there is nothing to save on Ctrl-C
        trainer.train()
    optimizer: Any = trainer.optimizer
    entries = [item for entry in optimizer.state.values() for item in entry.items()]
    moments = sum(value.nbytes for name, value in entries if name != "step")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Estimate(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        optimizer_bytes=sum(parameter.nbytes for parameter in trained) + moments,
        peak_bytes=peak_memory(),
        seconds_per_step=median(clock.seconds[1:]),
        num_steps=recipe.max_steps,
    )


class StepClock(TrainerCallback):
    """Measures the duration of each step in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock, after the device has finished its queue."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def peak_memory() -> int:
    """Return the largest memory so far in bytes: of tensors on a GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_megabytes(num_bytes: int) -> str:
    """Format bytes as megabytes."""
    return f"{num_bytes / 1e6:,.1f} MB"


def format_duration(seconds: float) -> str:
    """Format seconds, as minutes from two minutes on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
