"""Callbacks of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq.quantization.code_usage import CodeUsage

from ..atomic_io import write_atomically
from ..visualization.image_sheets import save_image


class ReadableProgressCallback(ProgressCallback):
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


class ResetCodeUsageCallback(TrainerCallback):
    """Counts the codes of each epoch for themselves."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what the last epoch used."""
        for module in kwargs["model"].modules():
            if isinstance(module, CodeUsage):
                module.reset()


class EvaluateAtEndCallback(TrainerCallback):
    """Evaluates and keeps the last weights too, whatever the rhythm, so that they can be the best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the last step, ask for both."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = args.save_strategy != "no"


class SampleCallback(TrainerCallback):
    """Saves an image, or a text, of what the model can do every so many steps."""

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
