"""Callbacks of the trainer: progress, code usage, the last evaluation, samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq.quantization.code_usage import CodeUsage

from ..atomic_io import write_atomically
from ..visualization.image_sheets import save_image

NOT_PRINTED = {"epoch", "total_flos", "grad_norm"}


class ReadableProgressCallback(ProgressCallback):
    """Progress bar of transformers with a readable line of the log instead of a printed dictionary."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the numbers of one line of the log."""
        if not state.is_world_process_zero or self.training_bar is None or "train_runtime" in logs:
            return
        numbers = [f"{name} {value:.4g}" for name, value in logs.items() if name not in NOT_PRINTED]
        self.training_bar.write(f"step {state.global_step:>6}  " + "  ".join(numbers))


class ResetCodeUsageCallback(TrainerCallback):
    """Restarts the count of used codes with each epoch."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the code usage of every quantizer in the model."""
        for module in kwargs["model"].modules():
            if isinstance(module, CodeUsage):
                module.reset()


class EvaluateAtEndCallback(TrainerCallback):
    """Evaluates and saves the last weights too, so that they can be the best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint after the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = args.save_strategy != "no"


class SampleCallback(TrainerCallback):
    """Saves a sample of what the model can do every `sample_steps` steps.

    Args:
        sample: Function that renders an image or a text.
        sample_steps: Steps between two samples.
    """

    def __init__(self, sample: Callable[[], Image.Image | str], sample_steps: int):
        self.sample, self.sample_steps = sample, sample_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Render a sample in eval mode, without touching the random numbers of training."""
        if state.global_step % self.sample_steps or not state.is_world_process_zero:
            return
        model = kwargs["model"]
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            sheet = self.sample()
        model.train()
        path = Path(str(args.output_dir)).parent / "samples" / f"step-{state.global_step:06d}"
        if isinstance(sheet, str):
            write_atomically(path.with_suffix(".txt"), sheet.encode())
        else:
            save_image(sheet, path.with_suffix(".png"))
