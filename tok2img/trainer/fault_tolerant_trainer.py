"""A trainer that loses nothing: checkpoints that are whole, exact resumption, and weights that no bad step can spoil."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from tokenizers_vq import ModelWithLoss
from tokenizers_vq.model_with_loss import get_inner_model

from ..atomic_io import check_manifest
from .checkpointing import folder_of, latest_valid_checkpoint, list_checkpoints, rotate, save_checkpoint
from .graceful_shutdown import GracefulShutdown, Interrupted
from .non_finite_guard import NonFiniteGuard
from .training_state import (
    load_optimizer,
    load_random_state,
    load_unsaved_buffers,
    save_optimizer,
    save_random_state,
    save_unsaved_buffers,
    whole,
    whole_state,
)

logger = logging.getLogger(__name__)
OPTIMIZER_FILE, SCHEDULE_FILE, TRAINER_STATE = "optimizer.safetensors", "schedule.json", "trainer_state.json"


class FaultTolerantTrainer(transformers.Trainer):
    """`transformers.Trainer` for runs that may be killed, on disks that may be full, with losses that may be NaN."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.bad_steps, self.stop_cleanly = NonFiniteGuard(self.args.device), GracefulShutdown()
        self._previous_best: tuple[float | None, int | None] = (None, None)
        self.add_callback(self.stop_cleanly)

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; processes on CPUs share weights too, where accelerate 1.15 would quietly give each all of them."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        plugin: Any = self.args.fsdp_plugin_args
        if plugin and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
            self.is_fsdp_enabled = True

    def begin(self, *, afresh: bool) -> None:
        """Called before the first step; `afresh` is false where a run goes on from a checkpoint."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True goes on from the newest in the output folder that is whole, if there is one.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when all is saved that can be.
            DivergedError: after too many steps in a row that were not finite.
        """
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False):  # of all machines, for they share a disk
                newest = latest_valid_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = str(newest) if newest else None
        if resume_from_checkpoint:
            logger.warning("going on from %s", resume_from_checkpoint)
            state = TrainerState.load_from_json(str(Path(str(resume_from_checkpoint), TRAINER_STATE)))
            if state.global_step >= self.args.max_steps:
                self._load_result(state, str(resume_from_checkpoint))
                return TrainOutput(self.state.global_step, math.nan, {})
        self.begin(afresh=not resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.stop_cleanly.release()
        if self.stop_cleanly.signum and self.state.global_step < self.state.max_steps:
            self._say_where_it_goes_on()
            raise Interrupted(self.stop_cleanly.signum)
        self._load_best_model()
        return output

    def _say_where_it_goes_on(self) -> None:
        """Of a run that was stopped: whether its last step is saved, and if not, which one is."""
        stopped_after, newest = (
            self.state.global_step,
            max(list_checkpoints(Path(str(self.args.output_dir))), default=0),
        )
        if newest == stopped_after:
            logger.warning("stopped after step %d and saved; the same command goes on from there", stopped_after)
        else:
            logger.warning(
                "stopped after step %d, not saved; the same command goes on from step %d", stopped_after, newest
            )

    def _load_result(self, state: TrainerState, checkpoint: str) -> None:
        """Load what a run whose last step is done came to; transformers would make one step too many."""
        self.state = state
        self._load_from_checkpoint(checkpoint)
        self._load_best_model()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of transformers, kept from steps that are not finite."""
        optimizer = super().create_optimizer(model)
        self.bad_steps.watch(optimizer)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the sum of losses starts anew from zero, where transformers subtracts it from itself and a NaN would stay for ever."""
        super().log(logs, start_time)
        if "loss" in logs:
            self._tr_loss.zero_()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; the loss is looked at before the optimizer's step."""
        loss = super().training_step(*args, **kwargs)
        self.bad_steps.observe_loss(loss)
        return loss

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in transformers; a new best is saved, whatever the rhythm, and the one before remembered, should that fail."""
        self._previous_best = self.state.best_metric, self.state.best_global_step
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.save_strategy != "no"
        return is_best

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint that appears whole or not at all; where that fails, warn and train on."""
        del model, trial
        self.store_flos()
        checkpoints, state = Path(str(self.args.output_dir)), self.state
        target = folder_of(checkpoints, state.global_step)
        problem = save_checkpoint(target, self._write_parts, device=self.args.device)
        if problem is not None:
            if state.best_global_step == state.global_step:  # what could not be written is not the best to go back to
                state.best_metric, state.best_global_step = self._previous_best
            logger.warning("no checkpoint of step %d, the run does not end for that: %s", state.global_step, problem)
        elif self.args.should_save:
            rotate(checkpoints, keep=self.args.save_total_limit or 2, best=state.best_global_step)

    def _write_parts(self, folder: Path) -> None:
        """What this process has to write into a checkpoint."""
        save_random_state(folder / self._own("random"))
        save_unsaved_buffers(folder / self._own("buffers"), self.unwrapped())
        self._save(str(folder), self._whole_weights())
        self._save_optimizer_and_scheduler(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        state = whole_state(optimizer)
        if self.args.should_save:
            save_optimizer(Path(output_dir, OPTIMIZER_FILE), state)
            schedule: Any = self.lr_scheduler
            Path(output_dir, SCHEDULE_FILE).write_text(json.dumps(schedule.state_dict()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        load_optimizer(Path(checkpoint, OPTIMIZER_FILE), optimizer)
        schedule.load_state_dict(json.loads(Path(checkpoint, SCHEDULE_FILE).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        file = Path(str(checkpoint), self._own("random"))
        if file.is_file():
            load_random_state(file)

    def _own(self, kind: str) -> str:
        """Name of the file of a kind that each process has for itself."""
        return f"{kind}-{self.args.process_index}.safetensors"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.unwrapped().save_pretrained(folder, state_dict=state_dict)

    def unwrapped(self, model: nn.Module | None = None) -> Any:
        """The trained model, or another, without what accelerate and `torch.compile` put around it."""
        return self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)

    def full_model(self) -> Any:
        """The trained model; where processes hold parts of it, a copy of the whole in the first process, and in the others none.

        All processes have to take part.
        """
        trained = self.unwrapped()
        model = get_inner_model(trained)
        state = self._whole_weights()
        if state is None:
            return model
        if not self.args.should_save:
            return None
        copy = type(model)(model.config)
        copy.generation_config = model.generation_config
        prefix = f"{trained.inner_name}." if isinstance(trained, ModelWithLoss) else ""
        copy.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        return copy

    def _whole_weights(self) -> dict[str, Any] | None:
        """Of a model of which processes hold parts, the weights put together in the first process; None for any other."""
        model: Any = self.model
        return {name: whole(part) for name, part in model.state_dict().items()} if self.is_fsdp_enabled else None

    def _load_best_model(self) -> None:
        """Go back to the best weights, where that is asked for; they lie in the run's folder, whatever that is called by now."""
        step = self.state.best_global_step
        if not self.args.load_best_model_at_end or step is None:
            return
        best = folder_of(Path(str(self.args.output_dir)), step)
        try:
            check_manifest(best)
        except ValueError as error:
            logger.warning("these are the last weights, for the best checkpoint is gone or damaged: %s", error)
        else:
            load_weights(self.unwrapped(), best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.unwrapped(model), resume_from_checkpoint)
        file = Path(resume_from_checkpoint, self._own("buffers"))
        if file.is_file():
            load_unsaved_buffers(file, self.unwrapped(model))


def load_weights(model: nn.Module, folder: str | Path | None) -> None:
    """Put the weights of a checkpoint folder into a model that is already built, of which a process may hold but parts."""
    inner, file = get_inner_model(model), Path(str(folder), "model.safetensors")
    if any(isinstance(parameter, DTensor) for parameter in inner.parameters()):
        # Not strict: of weights that are tied, a file holds one.
        options = StateDictOptions(full_state_dict=True, strict=False)
        weights: dict[str, Any] = dict(safetensors.torch.load_file(file))
        set_model_state_dict(inner, weights, options=options)
    else:
        safetensors.torch.load_model(inner, file)
    if isinstance(model, ModelWithLoss):
        model.load_loss(str(folder))
