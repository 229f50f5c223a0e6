"""What a training run would cost, from a few real steps on a handful of its rows; nothing is written where the run would write."""

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

from ..prior.lora import add_lora
from ..tokenization.map_function import TokenizeBatch, token_table
from ..trainer.trainer import Trainer
from .build_tokenizer import TEXT_TOKENIZERS, build_model
from .config import PriorRecipe, RunSettings, TokenizerRecipe, require
from .train_prior import init_prior, load_training_source, with_loss
from .train_tokenizer import training_dataset
from .training_run import arguments, open_data

NUM_STEPS = 5
MAX_ROWS = 64  # looked at; a larger batch repeats them


@dataclass
class Estimate:
    """What a run would cost.

    Attributes:
        parameters, trained_parameters: of the model and what learns beside it.
        weight_bytes: of all of them. optimizer_bytes: of gradients and moments.
        peak_bytes: the most memory held so far: by the process on a CPU, by tensors on a GPU.
        seconds_per_step: median of real steps after the first. num_steps: of the whole run.
        tokenize_seconds: of making the tokens first; 0 where they are there.
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
            "weights": in_megabytes(self.weight_bytes),
            "optimizer": f"{in_megabytes(self.optimizer_bytes)}: gradients and moments",
            "memory": f"{in_megabytes(self.peak_bytes)} at most, {holder}",
            "tokenizing": in_minutes(self.tokenize_seconds) if self.tokenize_seconds else "done before",
            "a step": f"{self.seconds_per_step:.3g} s",
            f"{self.num_steps} steps": f"{in_minutes(self.seconds_per_step * self.num_steps)}; "
            "held-out losses and samples come on top",
        }
        return "\n".join(f"{name:<12}  {value}" for name, value in lines.items())


def estimate_prior(recipe: PriorRecipe) -> Estimate:
    """Of `train_prior`: tokenizes a few rows and takes a few steps on them. Errors as there, for all that it looks at."""
    source, processor = load_training_source(recipe)
    prior = init_prior(recipe, processor)
    if recipe.lora_rank:
        add_lora(prior, processor.layout, rank=recipe.lora_rank, seed=recipe.seed)
    num_rows, seconds = min(MAX_ROWS, len(source)), 0.0
    if isinstance(source, Dataset):
        few = source.select(range(num_rows))
    else:
        started = time.perf_counter()
        tokens = TokenizeBatch(processor)(next(source.batches(range(num_rows), num_rows)))
        seconds = (time.perf_counter() - started) / num_rows * len(source)
        few = token_table(processor.layout, **tokens)
    rows = batch_of(few, recipe).with_format("torch")
    estimate = take_steps(with_loss(recipe, prior, processor), rows, replace(recipe, torch_compile=False))
    estimate.tokenize_seconds = seconds
    return estimate


def estimate_tokenizer(recipe: TokenizerRecipe) -> Estimate:
    """Of `train_tokenizer`, in the same way; ValueError for a BPE, which takes no steps."""
    require(recipe, "data")
    of_text = recipe.tokenizer in TEXT_TOKENIZERS
    if recipe.tokenizer == "bpe":
        raise ValueError("a BPE is counted, not trained in steps: there is nothing to estimate, run it as it is")
    rows = open_data(recipe, with_captions=of_text, with_images=not of_text)
    model = build_model(recipe, rows)
    return take_steps(model, training_dataset(get_inner_model(model), batch_of(rows, recipe)), recipe)


def batch_of(rows: Dataset, recipe: RunSettings) -> Dataset:
    """The rows of one step, the first few over and over."""
    num, few = recipe.batch_size * recipe.gradient_accumulation_steps, min(MAX_ROWS, len(rows))
    return rows.select([row % few for row in range(num)])


def take_steps(model: nn.Module, rows: Any, recipe: RunSettings) -> Estimate:
    """Train on these rows for a few steps, as the recipe says, and count and time."""
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
        trainer = Trainer(
            model, arguments(RunSettings(**kept | changed)), train_dataset=rows, optimizer=recipe.optimizer
        )
        trainer.add_callback(clock)
        trainer.remove_callback(trainer.stop_cleanly)  # there is nothing to save
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
    """Times each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, when the device has done what it was asked to."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def peak_memory() -> int:
    """Bytes: of tensors on a GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_megabytes(num_bytes: int) -> str:
    """As people read sizes."""
    return f"{num_bytes / 1e6:,.1f} MB"


def in_minutes(seconds: float) -> str:
    """As people read times."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
