"""One trainer for everything here whose forward returns a loss: image tokenizers and priors alike.

A thin layer on `SafeTrainer`: the parts of the loss reach the log, held-out loss is a mean over rows, pictures are drawn on the
way, and a tokenizer looks at its data before the first step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq import DiscreteTokenizer, TextSpanTokenizer
from tokenizers_vq.pixels import pixels_from_levels
from tokenizers_vq.quantizer import CodeUsage
from tokenizers_vq.ranks import num_ranks, own_shares
from tokenizers_vq.with_loss import inner_of

from .augmentation import Augmentation
from .muon import muon_for
from .plots import save_image
from .prior_loss import PriorWithLoss
from .processing import load_levels
from .safe_trainer import SafeTrainer
from .whole_files import write_atomically

MAX_DECODED_BYTES = 2**31
VALUES_TO_START_FROM = 2**25


class Trainer(SafeTrainer):
    """Trains a `DiscreteTokenizer` on its `pixel_values` or `symbols`, a `Distillation` or a `TokenizerWithLoss` on pictures,
    or a `PriorWithLoss` on `text_ids` and `image_codes`.

    Args:
        model: its forward takes the columns of the data and returns an output with `loss` and `metrics`.
        args: plain arguments of transformers.
        augment: what is done to the pictures that a tokenizer trains on.
        starts_from_data: whether a tokenizer looks at some data before its first step; not where it is trained already.
        optimizer, adamw_scale: "adamw" or "muon", and a rate within it, see `Muon`.
        draw: makes a picture (or a text) of what the model can do, every `draw_every` steps, for `samples/` of the output folder.
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
        adamw_scale: float = 1.0,
    ):
        train_dataset = Endless(train_dataset) if is_stream(train_dataset) else train_dataset
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            optimizer_cls_and_kwargs=muon_for(model, args, adamw_scale=adamw_scale) if optimizer == "muon" else None,
        )
        self.augment, self.starts_from_data = augment, starts_from_data
        self.metrics_since_log: dict[str, list[Tensor]] = defaultdict(list)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressInWords())
        self.add_callback(CountUsageAnew())
        if eval_dataset is not None and args.eval_strategy != "no":
            self.add_callback(EvaluateLast())
        if draw is not None and draw_every:
            self.add_callback(DrawSamples(draw, draw_every))

    def begin(self, *, afresh: bool) -> None:
        """A tokenizer that starts afresh looks at some of its data."""
        model: Any = self.model
        tokenizer = inner_of(model)
        may_start = afresh and self.starts_from_data
        if may_start and isinstance(tokenizer, DiscreteTokenizer) and not is_stream(self.train_dataset):
            self.start_from_data(tokenizer)

    def start_from_data(self, tokenizer: DiscreteTokenizer) -> None:
        """Show a tokenizer the first rows of a fixed shuffle of its training data, as many as it wants."""
        if not tokenizer.rows_to_start_from:
            return
        rows: Any = self.train_dataset
        column = tokenizer.main_input_name
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        num_rows = min(tokenizer.rows_to_start_from, max(1, VALUES_TO_START_FROM // rows[0][column].numel()))
        chosen = [rows[int(row)][column] for row in order[:num_rows]]
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            tokenizer.start_from_data(torch.stack(chosen).to(self.args.device))

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
            batches = model.prepare(batches, chance)
        if self.augment:
            sizes = [len(batch["pixel_values"]) for batch in batches]
            drawn = chance(num_ranks() * sum(sizes), self.augment.num_draws)
            for batch, draws in zip(batches, own_shares(drawn, sizes), strict=True):
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


def is_stream(dataset: Any) -> bool:
    """Whether rows only come one after another."""
    return not hasattr(dataset, "__len__")


class Endless(IterableDataset[Any]):
    """A stream over and over, each time as its next epoch.

    transformers counts the steps of an epoch by the rows of a data set; of a stream it would go on from the wrong place after the first.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            row = None
            for row in self.rows:
                yield row
            if row is None:
                return


class ProgressInWords(ProgressCallback):
    """The progress bar of transformers, with a readable line instead of a printed dictionary."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the numbers of one line of the log."""
        if not state.is_world_process_zero or self.training_bar is None or "train_runtime" in logs:
            return
        left_out = {"epoch", "total_flos", "grad_norm"}
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if name not in left_out]
        self.training_bar.write(f"step {state.global_step:>6}  " + "  ".join(numbers))


class CountUsageAnew(TrainerCallback):
    """Counts the codes of each epoch for themselves."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what the last epoch used."""
        for module in kwargs["model"].modules():
            if isinstance(module, CodeUsage):
                module.reset()


class EvaluateLast(TrainerCallback):
    """Evaluates and keeps the last weights too, whatever the rhythm, so that they can be the best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the last step, ask for both."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = args.save_strategy != "no"


class DrawSamples(TrainerCallback):
    """Saves a picture, or a text, of what the model can do every so many steps."""

    def __init__(self, draw: Callable[[], Image.Image | str], every: int):
        self.draw, self.every = draw, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, in eval mode and without touching the random numbers of training."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        model = kwargs["model"]
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            sheet = self.draw()
        model.train()
        path = Path(str(args.output_dir)).parent / "samples" / f"step-{state.global_step:06d}"
        if isinstance(sheet, str):
            write_atomically(path.with_suffix(".txt"), sheet.encode())
        else:
            save_image(sheet, path.with_suffix(".png"))


class PictureRows(Dataset[dict[str, Tensor]]):
    """Rows of a data set as `pixel_values` `c h w` for a tokenizer.

    What fits into `MAX_DECODED_BYTES` is decoded once, before training, so that a picture that does not decode is found at the start;
    rows of a larger set are decoded when they are asked for.
    """

    def __init__(self, dataset: Any, image_tokenizer: DiscreteTokenizer, image_column: str = "image"):
        self.dataset, self.image_tokenizer, self.image_column = dataset, image_tokenizer, image_column
        self.decoded: Tensor | None = None
        self.decoded = self._decode() if len(dataset) * self[0]["pixel_values"].numel() <= MAX_DECODED_BYTES else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if self.decoded is not None:
            return {"pixel_values": pixels_from_levels(self.decoded[row])}
        return {"pixel_values": pixels_from_levels(self._load([row])[0])}

    def _load(self, rows: Sequence[int]) -> Tensor:
        """Pictures as bytes, `b c h w`."""
        return load_levels(self.dataset[list(rows)][self.image_column], self.image_tokenizer, rows=rows)

    def _decode(self) -> Tensor:
        """All pictures as bytes, `n c h w`."""
        runs = [range(first, min(first + 256, len(self))) for first in range(0, len(self), 256)]
        with tqdm(total=len(self), desc="decode", unit=" pictures") as bar:
            decoded = []
            for rows in runs:
                decoded.append(self._load(rows))
                bar.update(len(rows))
        return torch.cat(decoded)


class TextRows(Dataset[dict[str, Tensor]]):
    """Captions of a data set as `symbols` `t` for a text tokenizer, read once."""

    def __init__(self, dataset: Any, text_model: TextSpanTokenizer, caption_column: str = "caption"):
        self.symbols = text_model.symbols(dataset[caption_column][:]).short()

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"symbols": self.symbols[row].long()}
