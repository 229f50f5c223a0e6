"""Save and stop on Ctrl-C and SIGTERM, so that the same command resumes the run."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenizers_vq.distributed import is_distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Exit of a run that was asked to stop and did. The code is 128 + signal, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class GracefulShutdown(TrainerCallback):
    """Saves a checkpoint and stops after the current step when a signal arrives; a second signal acts as usual.

    It saves in runs without checkpoints too.

    Attributes:
        signum: Number of the signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous_handlers: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the signal handlers, which only the main thread may do."""
        self.signum = 0
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal. The next one does what it did before."""
        del frame
        self.signum = signum
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the signal handlers from before the run."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end if a signal arrived in any process."""
        if is_distributed():
            # Signals reach processes between different steps: they agree, so that all stop after the same one.
            seen = torch.tensor(self.signum, device=args.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            self.signum = int(seen)
        if self.signum and state.global_step < state.max_steps:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
