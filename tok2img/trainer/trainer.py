"""One trainer for everything here whose forward returns a loss: image tokenizers and priors alike.

A thin layer on `FaultTolerantTrainer`: the parts of the loss reach the log, held-out loss is a mean over rows, images are drawn on the
way, and a tokenizer looks at its data before the first step.
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

from tokenizers_vq import DiscreteTokenizer
from tokenizers_vq.distributed import get_world_size, local_slices
from tokenizers_vq.model_with_loss import get_inner_model

from ..data.augmentation import Augmentation
from ..prior.loss import PriorWithLoss
from .callbacks import EvaluateAtEndCallback, ReadableProgressCallback, ResetCodeUsageCallback, SampleCallback
from .datasets import RepeatDataset, is_stream
from .fault_tolerant_trainer import FaultTolerantTrainer
from .muon import muon_optimizer_kwargs

VALUES_TO_START_FROM = 2**25


class Trainer(FaultTolerantTrainer):
    """Trains a `DiscreteTokenizer` on its `pixel_values` or `symbols`, a `Distillation` or a `TokenizerWithLoss` on images,
    or a `PriorWithLoss` on `text_ids` and `image_codes`.

    Args:
        model: its forward takes the columns of the data and returns an output with `loss` and `metrics`.
        args: plain arguments of transformers.
        augment: what is done to the images that a tokenizer trains on.
        starts_from_data: whether a tokenizer looks at some data before its first step; not where it is trained already.
        optimizer, adamw_lr_scale: "adamw" or "muon", and a rate within it, see `Muon`.
        draw: makes an image (or a text) of what the model can do, every `draw_every` steps, for `samples/` of the output folder.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        augment: Augmentation | None = None,
        draw: Callable[[], Image.Image | str] | None = None,
        draw_every: int = 0,
        starts_from_data: bool = True,
        optimizer: str = "adamw",
        adamw_lr_scale: float = 1.0,
    ):
        train_dataset = RepeatDataset(train_dataset) if is_stream(train_dataset) else train_dataset
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            optimizer_cls_and_kwargs=muon_optimizer_kwargs(model, args, adamw_lr_scale=adamw_lr_scale)
            if optimizer == "muon"
            else None,
        )
        self.augment, self.starts_from_data = augment, starts_from_data
        self.metrics_since_log: dict[str, list[Tensor]] = defaultdict(list)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ReadableProgressCallback())
        self.add_callback(ResetCodeUsageCallback())
        if eval_dataset is not None and args.eval_strategy != "no":
            self.add_callback(EvaluateAtEndCallback())
        if draw is not None and draw_every:
            self.add_callback(SampleCallback(draw, draw_every))

    def begin(self, *, afresh: bool) -> None:
        """A tokenizer that starts afresh looks at some of its data."""
        model: Any = self.model
        tokenizer = get_inner_model(model)
        may_start = afresh and self.starts_from_data
        if may_start and isinstance(tokenizer, DiscreteTokenizer) and not is_stream(self.train_dataset):
            self.init_from_data(tokenizer)

    def init_from_data(self, tokenizer: DiscreteTokenizer) -> None:
        """Show a tokenizer the first rows of a fixed shuffle of its training data, as many as it wants."""
        if not tokenizer.num_init_examples:
            return
        rows: Any = self.train_dataset
        column = tokenizer.main_input_name
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        num_rows = min(tokenizer.num_init_examples, max(1, VALUES_TO_START_FROM // rows[0][column].numel()))
        chosen = [rows[int(row)][column] for row in order[:num_rows]]
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            tokenizer.init_from_data(torch.stack(chosen).to(self.args.device))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """A shuffle that ends in a whole step, filled with rows of another shuffle, so that all processes share every step evenly."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if is_stream(rows):
            return None
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return RandomSampler(rows, num_samples=-(-len(rows) // step) * step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step, with what chance decides about them; those for a prior know of each other."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # By seed and step alone: the same in all processes, and after a run was taken up again.
        generator = np.random.default_rng([self.args.seed, self.state.global_step])

        def chance(*shape: int) -> Tensor:
            return torch.from_numpy(generator.random(shape, dtype=np.float32))

        model = self.unwrapped()
        if isinstance(model, PriorWithLoss):
            batches = model.prepare_step(batches, chance)
        if self.augment:
            sizes = [len(batch["pixel_values"]) for batch in batches]
            drawn = chance(get_world_size() * sum(sizes), self.augment.num_draws)
            for batch, draws in zip(batches, local_slices(drawn, sizes), strict=True):
                batch["pixel_values"] = self.augment(batch["pixel_values"], draws.to(batch["pixel_values"].device))
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; its metrics wait for the next line of the log."""
        outputs = model(**inputs)
        for name, value in (outputs.metrics or {}).items():
            self.metrics_since_log[name].append(value)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the steps since the last line beside the training loss."""
        if "loss" in logs:
            means = {
                name: torch.stack(values).float().mean() for name, values in sorted(self.metrics_since_log.items())
            }
            self.metrics_since_log.clear()
            over_ranks: Any = self.accelerator.reduce(means, "mean")
            logs = logs | {name: mean.item() for name, mean in over_ranks.items()}
            if self.bad_steps.skipped:
                logs["skipped_updates"] = float(self.bad_steps.skipped)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the rows of the held-out data, summed over all ranks."""
        model: Any = self.model
        model.eval()
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for batch, num_rows in self.held_out_batches(eval_dataset):
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

    def held_out_batches(self, eval_dataset: Any = None) -> Iterator[tuple[dict[str, Tensor], int]]:
        """This process's batches, and how many rows of each count.

        All processes get as many batches, the last of them filled with rows from the start: those are left out, but for one where
        nothing else is left, which counts for nothing.
        """
        loader, size = self.get_eval_dataloader(eval_dataset), self.args.eval_batch_size
        rows: Any = loader.dataset
        for number, batch in enumerate(loader):
            first = (number * self.args.world_size + self.args.process_index) * size
            num_rows = max(0, min(size, len(rows) - first))
            yield {name: column[: max(1, num_rows)] for name, column in batch.items()}, num_rows
