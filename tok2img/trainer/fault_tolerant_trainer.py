"""A trainer whose runs survive kills, full disks and NaNs, and resume exactly."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from tokenizers_vq import ModelWithLoss
from tokenizers_vq.model_with_loss import get_inner_model

from ..atomic_io import check_manifest
from .checkpointing import (
    checkpoint_path,
    latest_valid_checkpoint,
    list_checkpoints,
    rotate_checkpoints,
    save_checkpoint,
)
from .graceful_shutdown import GracefulShutdown, Interrupted
from .non_finite_guard import NonFiniteGuard
from .training_state import (
    load_optimizer,
    load_random_state,
    load_unsaved_buffers,
    save_optimizer,
    save_random_state,
    save_unsaved_buffers,
)

logger = logging.getLogger(__name__)
OPTIMIZER_FILE, SCHEDULE_FILE, TRAINER_STATE = "optimizer.safetensors", "schedule.json", "trainer_state.json"


class FaultTolerantTrainer(transformers.Trainer):
    """`transformers.Trainer` for runs that may be killed, on disks that may be full, with losses that may be NaN.

    - A checkpoint appears whole or not at all. One that cannot be written costs a warning, not the run.
    - Resuming takes the newest checkpoint whose manifest verifies, and continues to the same bits.
    - Ctrl-C and SIGTERM save before the run stops.
    - A step with a non-finite loss or gradient is skipped and counted.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.non_finite_guard, self.graceful_shutdown = NonFiniteGuard(self.args.device), GracefulShutdown()
        self._previous_best: tuple[float | None, int | None] = (None, None)
        self.add_callback(self.graceful_shutdown)

    def on_begin(self, *, resumed: bool) -> None:
        """Do what has to happen before the first step. Subclasses override this hook.

        Args:
            resumed: True if the run continues from a checkpoint.
        """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train to the end, and load the best weights if the arguments ask for them.

        Args:
            resume_from_checkpoint: Folder of a checkpoint. True = the newest valid one in the output folder,
                or from scratch if there is none.
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM, once everything that can be saved is saved.
            DivergedError: After too many consecutive non-finite steps.
        """
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False):  # of all machines: they share a disk
                newest = latest_valid_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = str(newest) if newest else None
        if resume_from_checkpoint:
            logger.warning("resuming from %s", resume_from_checkpoint)
            state = TrainerState.load_from_json(str(Path(str(resume_from_checkpoint), TRAINER_STATE)))
            if state.global_step >= self.args.max_steps:
                # The run is finished. transformers would train one more step than max_steps.
                self.state = state
                self._load_from_checkpoint(str(resume_from_checkpoint))
                self._load_best_model()
                return TrainOutput(self.state.global_step, math.nan, {})
        self.on_begin(resumed=bool(resume_from_checkpoint))
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.graceful_shutdown.restore_handlers()
        if self.graceful_shutdown.signum and self.state.global_step < self.state.max_steps:
            self._report_interruption()
            raise Interrupted(self.graceful_shutdown.signum)
        self._load_best_model()
        return output

    def _report_interruption(self) -> None:
        """Say whether the last step of a stopped run is saved and, if not, which step is."""
        last = self.state.global_step
        newest = max(list_checkpoints(Path(str(self.args.output_dir))), default=0)
        if newest == last:
            logger.warning("stopped after step %d and saved; run the same command to resume", last)
        else:
            logger.warning("stopped after step %d, not saved; the same command resumes from step %d", last, newest)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer as transformers does, guarded against non-finite steps."""
        optimizer = super().create_optimizer(model)
        self.non_finite_guard.watch(optimizer)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line, and restart the sum of losses at zero.

        transformers subtracts the logged sum from itself instead, so that one NaN would stay for ever.
        """
        super().log(logs, start_time)
        if "loss" in logs:
            self._tr_loss.zero_()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute loss and gradients as transformers does; the guard sees the loss before the optimizer steps."""
        loss = super().training_step(*args, **kwargs)
        self.non_finite_guard.observe_loss(loss)
        return loss

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save a new best immediately, and remember the previous best in case that save fails."""
        self._previous_best = self.state.best_metric, self.state.best_global_step
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.save_strategy != "no"
        return is_best

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint that appears whole or not at all; warn if that fails, and train on."""
        del model, trial
        self.store_flos()
        checkpoints, state = Path(str(self.args.output_dir)), self.state
        target = checkpoint_path(checkpoints, state.global_step)
        problem = save_checkpoint(target, self._write_own_files, device=self.args.device)
        if problem is not None:
            if state.best_global_step == state.global_step:  # a checkpoint that was not written can't be the best
                state.best_metric, state.best_global_step = self._previous_best
            logger.warning("could not save a checkpoint at step %d; training continues: %s", state.global_step, problem)
        elif self.args.should_save:
            rotate_checkpoints(checkpoints, keep=self.args.save_total_limit or 2, best=state.best_global_step)

    def _write_own_files(self, folder: Path) -> None:
        """Write the files that this process contributes to a checkpoint."""
        save_random_state(folder / self._rank_file("random"))
        save_unsaved_buffers(folder / self._rank_file("buffers"), self.unwrapped())
        self._save(str(folder), self._full_weights())
        self._save_optimizer_and_scheduler(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        save_optimizer(Path(output_dir, OPTIMIZER_FILE), self.unwrapped(), optimizer, write=self.args.should_save)
        if self.args.should_save:
            Path(output_dir, SCHEDULE_FILE).write_text(json.dumps(schedule.state_dict()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        load_optimizer(Path(checkpoint, OPTIMIZER_FILE), self.unwrapped(), optimizer)
        schedule.load_state_dict(json.loads(Path(checkpoint, SCHEDULE_FILE).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(str(checkpoint), self._rank_file("random"))
        if file.is_file():
            load_random_state(file)

    def _rank_file(self, kind: str) -> str:
        """Return the name of a file that each process has for itself."""
        return f"{kind}-{self.args.process_index}.safetensors"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.unwrapped().save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def unwrapped(self, model: nn.Module | None = None) -> Any:
        """Return the trained model, or `model`, without the wrappers of accelerate and `torch.compile`."""
        return self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)

    def full_model(self) -> Any:
        """Return the trained model. All processes have to call this.

        Where processes share the weights (FSDP), the first gets a copy with all of them, the others None.
        """
        trained = self.unwrapped()
        model = get_inner_model(trained)
        state = self._full_weights()
        if state is None:
            return model
        if not self.args.should_save:
            return None
        copy = type(model)(model.config)
        copy.generation_config = model.generation_config
        prefix = f"{trained.inner_name}." if isinstance(trained, ModelWithLoss) else ""
        copy.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        return copy

    def _full_weights(self) -> dict[str, Any] | None:
        """Gather the weights of a sharded model on the first process's CPU; None for any other model."""
        if not self.is_fsdp_enabled:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model: Any = self.model
        return get_model_state_dict(model, options=options)

    def _load_best_model(self) -> None:
        """Load the best weights if the arguments ask for them.

        They lie in the run's folder, which may have been renamed since; transformers keeps an absolute path.
        """
        step = self.state.best_global_step
        if not self.args.load_best_model_at_end or step is None:
            return
        best = checkpoint_path(Path(str(self.args.output_dir)), step)
        try:
            check_manifest(best)
        except ValueError as error:
            logger.warning("best checkpoint missing or damaged; keeping the last weights: %s", error)
        else:
            load_weights(self.unwrapped(), best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.unwrapped(model), resume_from_checkpoint)
        file = Path(resume_from_checkpoint, self._rank_file("buffers"))
        if file.is_file():
            load_unsaved_buffers(file, self.unwrapped(model))


def load_weights(model: nn.Module, folder: str | Path | None) -> None:
    """Load the weights of a checkpoint into a model that is built already, sharded or not."""
    inner, file = get_inner_model(model), Path(str(folder), "model.safetensors")
    if any(isinstance(parameter, DTensor) for parameter in inner.parameters()):
        # Not strict: of tied weights the file holds one.
        options = StateDictOptions(full_state_dict=True, strict=False)
        weights: dict[str, Any] = dict(safetensors.torch.load_file(file))
        set_model_state_dict(inner, weights, options=options)
    else:
        safetensors.torch.load_model(inner, file)
    if isinstance(model, ModelWithLoss):
        model.load_loss(str(folder))
