"""One trainer for every model here whose forward returns a loss: tokenizers, priors, rankers, classifiers.

A thin layer on `FaultTolerantTrainer`. It knows no concrete model: what a model wants to do with the
batches of a step it does in `ModelWithLoss.prepare_step`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import ProgressCallback, TrainingArguments

from tokenizers_vq import DiscreteTokenizer, ModelWithLoss
from tokenizers_vq.distributed import get_world_size, local_slices
from tokenizers_vq.model_with_loss import get_inner_model

from ..data.augmentation import Augmentation
from .callbacks import EvaluateAtEndCallback, ReadableProgressCallback, ResetCodeUsageCallback, SampleCallback
from .datasets import RepeatDataset, is_stream
from .fault_tolerant_trainer import FaultTolerantTrainer
from .muon import muon_optimizer_kwargs

MAX_INIT_VALUES = 2**25  # numbers that a tokenizer is initialized from: 128 MB of float32


class Trainer(FaultTolerantTrainer):
    """`transformers.Trainer` for tokenizers and priors, which resumes exactly and survives bad steps.

    In addition to transformers' trainer, it logs the terms of the loss, averages the held-out loss over
    examples and saves samples while training. A tokenizer is initialized from data before the first step.

    Args:
        model: Model whose forward takes the columns of the data set and returns an output with `loss` and `metrics`.
        args: Training arguments of transformers.
        train_dataset: Data set with a length, or a stream of examples (any iterable).
        eval_dataset: Held-out data set.
        augment: Augmentation of the training images, applied to whole batches.
        sample: Function that renders what the model can do, as an image or as text. It is called every
            `sample_steps` steps, and the result is saved in `samples/` next to the checkpoints' folder.
        sample_steps: Steps between two samples. 0 = none.
        init_from_data: Initialize a tokenizer's codebooks from training data. False for a trained tokenizer.
        optimizer: "adamw" or "muon".
        adamw_lr_scale: With Muon, learning rate of the parameters that AdamW trains, as a fraction of Muon's.

    Example:
        >>> import contextlib, tempfile, torch
        >>> from datasets import Dataset
        >>> from transformers import TrainingArguments
        >>> from tok2img import Trainer
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> config = VQVAEConfig(image_size=8, hidden_channels=8, num_decoder_blocks=1, codebook_size=4, code_dim=2)
        >>> model = VQVAE(config)
        >>> rows = Dataset.from_dict({"pixel_values": torch.rand(8, 3, 8, 8)}).with_format("torch")
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        ...     args = TrainingArguments(folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        ...     args.remove_unused_columns, args.save_strategy = False, "no"
        ...     output = Trainer(model, args, train_dataset=rows).train()
        >>> output.global_step
        2
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        augment: Augmentation | None = None,
        sample: Callable[[], Image.Image | str] | None = None,
        sample_steps: int = 0,
        init_from_data: bool = True,
        optimizer: str = "adamw",
        adamw_lr_scale: float = 1.0,
    ):
        muon = muon_optimizer_kwargs(model, args, adamw_lr_scale=adamw_lr_scale) if optimizer == "muon" else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=RepeatDataset(train_dataset) if is_stream(train_dataset) else train_dataset,
            eval_dataset=eval_dataset,
            optimizer_cls_and_kwargs=muon,
        )
        self.augment, self.init_from_data = augment, init_from_data
        self.metrics_since_log: dict[str, list[Tensor]] = defaultdict(list)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ReadableProgressCallback())
        self.add_callback(ResetCodeUsageCallback())
        if eval_dataset is not None and args.eval_strategy != "no":
            self.add_callback(EvaluateAtEndCallback())
        if sample is not None and sample_steps:
            self.add_callback(SampleCallback(sample, sample_steps))

    def on_begin(self, *, resumed: bool) -> None:
        """Initialize a tokenizer from the first examples of a fixed shuffle of its training data."""
        tokenizer = get_inner_model(self.model)  # type: ignore[reportArgumentType] - transformers allows None
        wants_data = isinstance(tokenizer, DiscreteTokenizer) and tokenizer.num_init_examples
        if resumed or not self.init_from_data or not wants_data or is_stream(self.train_dataset):
            return
        rows: Any = self.train_dataset
        column = tokenizer.main_input_name
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        num_rows = min(tokenizer.num_init_examples, max(1, MAX_INIT_VALUES // rows[0][column].numel()))
        chosen = [rows[int(row)][column] for row in order[:num_rows]]
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            tokenizer.init_from_data(torch.stack(chosen).to(self.args.device))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return a shuffle whose last step is filled up from another shuffle.

        Every step then has the same number of examples, which processes can share evenly.
        """
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if is_stream(rows):
            return None
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return RandomSampler(rows, num_samples=-(-len(rows) // step) * step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of one step, after `prepare_step` of the model and augmentation."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Seeded by (seed, step) alone, so that all processes agree and a resumed run repeats its steps exactly.
        generator = np.random.default_rng([self.args.seed, self.state.global_step])

        def uniforms(*shape: int) -> Tensor:
            return torch.from_numpy(generator.random(shape, dtype=np.float32))

        model = self.unwrapped()
        if isinstance(model, ModelWithLoss):
            batches = model.prepare_step(batches, uniforms)
        if self.augment:
            sizes = [len(batch["pixel_values"]) for batch in batches]
            noise = uniforms(get_world_size() * sum(sizes), self.augment.num_draws)
            for batch, own_noise in zip(batches, local_slices(noise, sizes), strict=True):
                batch["pixel_values"] = self.augment(batch["pixel_values"], own_noise.to(batch["pixel_values"].device))
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the model's own loss, and keep its metrics for the next line of the log."""
        outputs = model(**inputs)
        for name, value in (outputs.metrics or {}).items():
            self.metrics_since_log[name].append(value)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line, with the mean metrics of all processes since the last line next to the training loss."""
        if "loss" in logs:
            means = {
                name: torch.stack(values).float().mean() for name, values in sorted(self.metrics_since_log.items())
            }
            self.metrics_since_log.clear()
            over_ranks: Any = self.accelerator.reduce(means, "mean")
            logs = logs | {name: mean.item() for name, mean in over_ranks.items()}
            if self.non_finite_guard.skipped:
                logs["skipped_updates"] = float(self.non_finite_guard.skipped)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss and metrics as means over the held-out examples of all processes."""
        model: Any = self.model
        model.eval()
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for batch, num_rows in self._held_out_batches(eval_dataset):
            with self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(batch))
            for name, value in {"loss": outputs.loss, **(outputs.metrics or {}), "rows": torch.tensor(1.0)}.items():
                totals[name] += value.float().to(self.args.device) * num_rows
        reduced: Any = self.accelerator.reduce(dict(totals), "sum")
        summed = {name: total.item() for name, total in reduced.items()}
        metrics = {
            f"{metric_key_prefix}_{name}": total / summed["rows"] for name, total in summed.items() if name != "rows"
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_batches(self, eval_dataset: Any = None) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Yield this process's batches, each with the number of its examples that count.

        accelerate fills the last batches with examples from the start, so that all processes get equally
        many. These are cut off. A batch of nothing else keeps one example, which counts 0 times.
        """
        loader, size = self.get_eval_dataloader(eval_dataset), self.args.eval_batch_size
        rows: Any = loader.dataset
        for number, batch in enumerate(loader):
            first = (number * self.args.world_size + self.args.process_index) * size
            num_rows = max(0, min(size, len(rows) - first))
            yield {name: column[: max(1, num_rows)] for name, column in batch.items()}, num_rows
