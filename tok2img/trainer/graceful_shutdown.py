"""Ctrl-C and SIGTERM: a run finishes its step, saves, and leaves, so that the same command goes on from there."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq.distributed import is_distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run was asked to stop, and did; its code is the one that shells have for a process that the signal ended."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class GracefulShutdown(TrainerCallback):
    """On the first signal, save, in a run without checkpoints too, and stop after the step; on the second, as ever.

    Attributes:
        signum: of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen; only the main thread may."""
        self.signum = 0
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal, and let the next one do what it did before."""
        del frame
        self.signum = signum
        self.release()

    def release(self) -> None:
        """Stop listening."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal, in any process, ask for a checkpoint and the end."""
        if is_distributed():
            seen = torch.tensor(self.signum, device=args.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            self.signum = int(seen)
        if self.signum and state.global_step < state.max_steps:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
