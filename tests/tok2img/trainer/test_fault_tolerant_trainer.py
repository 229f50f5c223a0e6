import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from tok2img import atomic_io
from tok2img.data.augmentation import Augmentation
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.training_run import training_arguments
from tok2img.tokenization.layout import SequenceLayout
from tok2img.trainer import fault_tolerant_trainer
from tok2img.trainer.checkpointing import latest_valid_checkpoint, list_checkpoints
from tok2img.trainer.graceful_shutdown import Interrupted
from tok2img.trainer.non_finite_guard import DivergedError
from tok2img.trainer.trainer import Trainer
from tokenizers_vq import VQVAE, DiscreteTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig
from tokenizers_vq.vqdraw import core as vqdraw

LAYOUT = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
RUN_OF_ALL = {"max_steps": 8, "batch_size": 4, "warmup_steps": 1, "sample_steps": 0, "logging_steps": 1}
RUN = RUN_OF_ALL | {"dropout": 0.1}
CRASH_EVERY = int(os.environ.get("CRASH_EVERY", "3"))  # 1 in `make torture`


def token_rows(num: int) -> Dataset:
    generator = torch.Generator().manual_seed(num)
    columns = {"text_ids": (11, 3), "image_codes": (6, 4)}
    rows = {name: torch.randint(high, (num, length), generator=generator) for name, (high, length) in columns.items()}
    return Dataset.from_dict({name: column.tolist() for name, column in rows.items()}).with_format("torch")


def trainer_in(out, *, best: str = "", **settings) -> Trainer:
    """A tiny prior that draws random numbers in training: for dropout, and for the captions it hides."""
    recipe = PriorRecipe(**({"out": str(out), "eval_steps": 0, "save_steps": 2} | RUN | settings))
    prior = build_prior(LAYOUT, depth=1, dropout=recipe.dropout)
    return Trainer(
        PriorWithLoss(prior, LAYOUT, caption_dropout=0.5),
        training_arguments(recipe, best_by=best),
        train_dataset=token_rows(10),
        eval_dataset=token_rows(5),
    )


def tiny_vqvae(codebook_size: int = 8) -> VQVAE:
    return VQVAE(VQVAEConfig(image_size=8, hidden_channels=8, codebook_size=codebook_size, code_dim=4))


def tiny_vqdraw() -> VQDrawForImages:
    sizes = {"hidden_channels": 8, "feature_channels": 8, "num_residual_blocks": 1}
    return VQDrawForImages(VQDrawImageConfig(image_size=8, num_stages=2, codebook_size=32, **sizes))


def tokenizer_trainer_in(out, build: Callable[[], DiscreteTokenizer] = tiny_vqvae, **settings) -> Trainer:
    """A tiny VQ-VAE, or another tokenizer, on images that are changed at random."""
    recipe = TokenizerRecipe(**({"out": str(out), "eval_steps": 0, "save_steps": 2} | RUN_OF_ALL | settings))
    torch.manual_seed(0)
    model = build()
    pixels = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    rows = Dataset.from_dict({"pixel_values": pixels.tolist()}).with_format("torch")
    return Trainer(
        model,
        training_arguments(recipe, best_by=""),
        train_dataset=rows,
        augment=Augmentation(flip=True, crop=0.5, shift=2),
    )


def losses(trainer: Trainer) -> dict[int, str]:
    """The logged loss of each step, to its last bit."""
    lines = (line for line in trainer.state.log_history if "loss" in line)
    return {line["step"]: struct.pack(">d", line["loss"]).hex() for line in lines}


def weights(trainer: Trainer) -> bytes:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return b"".join(tensor.numpy().tobytes() for _, tensor in sorted(model.state_dict().items()))


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


class Killed(BaseException):
    """Stands for a process that ends here."""


def kill() -> None:
    raise Killed


def run_until_killed(trainer: Trainer, step: int) -> None:
    trainer.add_callback(At(step, kill))
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.0},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3},
        {"dataloader_num_workers": 2},
        {"bf16": True},
        {"lr_scheduler_type": "linear"},
        {"save_steps": 3, "batch_size": 5},
        {"eval_steps": 2, "save_steps": 4},
        {"eval_steps": 2, "save_steps": 4, "best": "image_loss"},
    ],
    ids=str,
)
@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path, settings, killed_at):
    whole = trainer_in(tmp_path / "whole", **settings)
    whole.train()
    run_until_killed(trainer_in(tmp_path / "killed", **settings), killed_at)
    resumed = trainer_in(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 8
    assert weights(resumed) == weights(whole)


class TestOtherRows:
    """The same for images that are changed at random, and for a stream that is shuffled on the way."""

    @pytest.fixture(params=["augmented", "augmented, by workers", "stream", "stream, third epoch", "stream, workers"])
    def trainer(self, request):
        """A trainer in a folder."""

        def in_folder(out) -> Trainer:
            dataloader_num_workers = 2 if "workers" in request.param else 0
            if request.param.startswith("augmented"):
                return tokenizer_trainer_in(out, dataloader_num_workers=dataloader_num_workers)
            run = RUN_OF_ALL | {
                "out": str(out),
                "eval_steps": 0,
                "save_steps": 2,
                "dataloader_num_workers": dataloader_num_workers,
            }
            rows = token_rows(12 if request.param.endswith("epoch") else 40)
            stream = rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=6)
            prior = PriorWithLoss(build_prior(LAYOUT, depth=1, dropout=0.1), LAYOUT, caption_dropout=0.5)
            return Trainer(prior, training_arguments(PriorRecipe(**run), best_by=""), train_dataset=stream)

        return in_folder

    @pytest.mark.parametrize("killed_at", [3, 7])
    def test_a_killed_run_goes_on_to_the_same_losses_and_weights(self, trainer, tmp_path, killed_at):
        whole = trainer(tmp_path / "whole")
        whole.train()
        run_until_killed(trainer(tmp_path / "killed"), killed_at)
        resumed = trainer(tmp_path / "killed")
        resumed.train(resume_from_checkpoint=True)
        assert losses(resumed) == losses(whole) and len(losses(whole)) == 8
        assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("build", [tiny_vqdraw, partial(tiny_vqvae, codebook_size=40)], ids=["vqdraw", "vqvae"])
def test_what_is_counted_but_not_saved_with_a_model_goes_on_too(tmp_path, monkeypatch, build):
    """Options revived at step 6; a codebook that waits until step 10 for vectors enough to start from."""
    monkeypatch.setattr(vqdraw, "REPLACEMENT_INTERVAL", 6)
    trainer = partial(tokenizer_trainer_in, build=build, max_steps=12)
    whole = trainer(tmp_path / "whole")
    whole.train()
    run_until_killed(trainer(tmp_path / "killed"), 5)
    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert weights(resumed) == weights(whole)


def test_a_run_killed_again_and_again_arrives_where_one_does_that_is_not(tmp_path):
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    for step in (1, 3, 4, 5, 7):
        run_until_killed(trainer_in(tmp_path / "killed"), step)
    last = trainer_in(tmp_path / "killed")
    last.train(resume_from_checkpoint=True)
    assert losses(last) == losses(whole) and weights(last) == weights(whole)


def test_one_process_of_all_machines_looks_for_checkpoints_first(tmp_path, monkeypatch):
    """Machines share the folder: their first processes would remove the same damaged checkpoint."""
    seen = []

    def first(arguments, local=True, desc=""):
        seen.append(local)
        return contextlib.nullcontext()

    monkeypatch.setattr(TrainingArguments, "main_process_first", first)
    trainer_in(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    assert seen[:1] == [False]


def test_checkpoints_hold_nothing_that_would_have_to_be_unpickled(tmp_path):
    trainer_in(tmp_path).train()
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json"} and ".safetensors" in suffixes


def test_at_least_two_checkpoints_are_kept_and_the_best(tmp_path):
    trainer = trainer_in(tmp_path, best="image_loss", eval_steps=2)
    trainer.train()
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert {6, 8} <= kept.keys() and len(kept) <= 3
    assert trainer.state.best_global_step in kept
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "pattern", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "schedule.json"]
)
def test_a_flipped_bit_sends_the_run_back_to_the_checkpoint_before(tmp_path, pattern, caplog):
    run_until_killed(trainer_in(tmp_path), 7)
    damaged = tmp_path / "checkpoints" / "checkpoint-6" / pattern
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    assert latest_valid_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-4"
    assert pattern in caplog.text and "passed over" in caplog.text


@pytest.mark.parametrize("pattern", ["model.safetensors", "optimizer.safetensors"])
def test_fifty_of_fifty_flipped_bits_are_reported(tmp_path, pattern, caplog):
    run_until_killed(trainer_in(tmp_path), 7)
    chance = random.Random(5)
    for number in range(50):
        checkpoints = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "checkpoints", checkpoints)
        damaged = checkpoints / "checkpoint-6" / pattern
        content = bytearray(damaged.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(content)
        caplog.clear()
        assert latest_valid_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
        assert pattern in caplog.text and "passed over" in caplog.text
    assert latest_valid_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-6"


def events_of_a_save(trainer_in, tmp_path, monkeypatch) -> list[str]:
    """What a save does to the file system, in order, by trying it once."""
    events: list[str] = []
    watch(monkeypatch, lambda name: events.append(name))
    run_until_killed(trainer_in(tmp_path / "count", save_steps=3), 4)
    monkeypatch.undo()
    return events


def watch(monkeypatch, act) -> None:
    """Call `act` before every step by which a checkpoint comes into being."""
    for module, name in [
        (fault_tolerant_trainer, "save_random_state"),
        (fault_tolerant_trainer, "save_optimizer"),
        (fault_tolerant_trainer.FaultTolerantTrainer, "_write_own_files"),
        (atomic_io.Path, "rename"),
        (atomic_io.Path, "chmod"),
        (atomic_io.Path, "write_text"),
        (atomic_io.Path, "mkdir"),
        (atomic_io, "fsync_path"),
    ]:
        plain = getattr(module, name)

        def before(*args, plain=plain, name=name, **kwargs):
            act(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, before)


@pytest.mark.parametrize("trainer_in", [trainer_in, tokenizer_trainer_in])
def test_a_crash_at_any_step_of_a_save_loses_no_run(trainer_in, tmp_path, monkeypatch):
    whole = trainer_in(tmp_path / "whole", save_steps=3)
    whole.train()
    num_events = len(events_of_a_save(trainer_in, tmp_path, monkeypatch))
    assert num_events > 15
    for crash_at in range(0, num_events, CRASH_EVERY):
        out, seen = tmp_path / f"crash-{crash_at}", []

        def crash(name, seen=seen, crash_at=crash_at):
            seen.append(name)
            if len(seen) == crash_at + 1:
                raise Killed

        with monkeypatch.context() as patched:
            watch(patched, crash)
            with pytest.raises(Killed):
                trainer_in(out, save_steps=3).train(resume_from_checkpoint=True)
        resumed = trainer_in(out, save_steps=3)
        resumed.train(resume_from_checkpoint=True)
        assert losses(resumed) == losses(whole), f"crash before {crash_at}"


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path, monkeypatch, caplog):
    whole = trainer_in(tmp_path / "whole", save_steps=3)
    whole.train()
    plain, saves = fault_tolerant_trainer.save_optimizer, []

    def full(*args, **kwargs):
        saves.append(args)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*args, **kwargs)

    monkeypatch.setattr(fault_tolerant_trainer, "save_optimizer", full)
    trainer = trainer_in(tmp_path / "full")
    trainer.train()
    assert "could not save a checkpoint at step 4" in caplog.text and "No space left" in caplog.text
    assert set(list_checkpoints(tmp_path / "full" / "checkpoints")) == {6, 8}
    assert not [path for path in (tmp_path / "full" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert weights(trainer) == weights(whole)


def test_weights_that_do_not_fit_on_the_disk_cost_a_warning_and_not_the_run(tmp_path, caplog):
    trainer, unlimited = trainer_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, unlimited[1]))))
    trainer.add_callback(At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)))
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "could not save a checkpoint at step 4" in caplog.text and "File too large" in caplog.text
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-8"}
    assert len(losses(trainer)) == 8


def test_a_best_checkpoint_that_could_not_be_written_is_not_gone_back_to(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path, best="image_loss", eval_steps=2, learning_rate=1e-2)
    plain = fault_tolerant_trainer.save_checkpoint

    def full_at_the_end(target, *args, **kwargs):
        return OSError("full") if target.name == "checkpoint-8" else plain(target, *args, **kwargs)

    monkeypatch.setattr(fault_tolerant_trainer, "save_checkpoint", full_at_the_end)
    trainer.train()
    assert trainer.state.best_global_step in list_checkpoints(tmp_path / "checkpoints")


def test_a_run_that_goes_on_remembers_its_best_where_the_next_save_fails(tmp_path, monkeypatch):
    settings = {"best": "image_loss", "eval_steps": 2, "learning_rate": 1e-3}
    run_until_killed(trainer_in(tmp_path, **settings), 5)
    trainer = trainer_in(tmp_path, **settings)
    monkeypatch.setattr(fault_tolerant_trainer, "save_checkpoint", lambda *args, **kwargs: OSError("full"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_global_step in list_checkpoints(tmp_path / "checkpoints")


def with_held_out_losses(trainer: Trainer, held_out: list[float]) -> Trainer:
    """Gives a trainer that evaluates every 2 steps these held-out losses."""

    def evaluate(*args, **kwargs):
        metrics = {"eval_image_loss": held_out[trainer.state.global_step // 2 - 1]}
        trainer.log(dict(metrics))
        return metrics

    trainer.evaluate = evaluate
    return trainer


def test_the_best_weights_are_kept_where_checkpoints_are_rarer_than_held_out_losses(tmp_path):
    trainer = trainer_in(tmp_path, best="image_loss", eval_steps=2, save_steps=4)
    at_best = []
    trainer.add_callback(At(6, lambda: at_best.append(weights(trainer))))
    with_held_out_losses(trainer, [2.0, 3.0, 1.0, 4.0]).train()
    assert set(list_checkpoints(tmp_path / "checkpoints")) == {6, 8} and at_best == [weights(trainer)]


@pytest.mark.parametrize("moved_to", ["run", "elsewhere"])
def test_a_run_goes_back_to_its_best_under_another_name_of_its_folder(tmp_path, monkeypatch, moved_to):
    monkeypatch.chdir(tmp_path)
    settings, held_out = {"best": "image_loss", "eval_steps": 2}, [1.0, 2.0, 3.0, 4.0]
    run_until_killed(with_held_out_losses(trainer_in("run", **settings), held_out), 5)
    best = (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors").read_bytes()
    Path("run").rename(moved_to)
    trainer = with_held_out_losses(trainer_in(tmp_path / moved_to, **settings), held_out)
    trainer.train(resume_from_checkpoint=True)
    assert set(list_checkpoints(tmp_path / moved_to / "checkpoints")) == {2, 6, 8}
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == best


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda best: (best / "model.safetensors").write_bytes(b"half")])
def test_a_best_checkpoint_that_is_gone_or_damaged_is_named_and_the_last_weights_stay(tmp_path, caplog, harm):
    settings, held_out = {"best": "image_loss", "eval_steps": 2}, [1.0, 2.0, 3.0, 4.0]
    run_until_killed(with_held_out_losses(trainer_in(tmp_path, **settings), held_out), 5)
    harm(tmp_path / "checkpoints" / "checkpoint-2")
    trainer = with_held_out_losses(trainer_in(tmp_path, **settings), held_out)
    trainer.train(resume_from_checkpoint=True)
    assert "best checkpoint missing or damaged" in caplog.text and "checkpoint-2: " in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    last = tmp_path / "checkpoints" / "checkpoint-8"
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()


def spoil_loss(trainer: Trainer, steps: set[int], value: float) -> None:
    """Make the loss of these steps NaN or infinite, by a factor on its way to the gradient."""
    model = trainer.model
    plain, calls = model.forward, []

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        if model.training:
            calls.append(None)
            if len(calls) in steps:
                output.loss = output.loss * value
        return output

    model.forward = forward


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [{1}, {5}, {8}, {2, 3, 4, 5}], ids=str)
def test_a_loss_that_is_not_finite_leaves_the_weights_finite_and_is_logged_as_it_is(tmp_path, steps, value):
    trainer = trainer_in(tmp_path)
    spoil_loss(trainer, steps, value)
    trainer.train()
    assert trainer.non_finite_guard.skipped == len(steps)
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    logged = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert {step for step, loss in logged.items() if not math.isfinite(loss)} == steps
    assert trainer.state.log_history[-2]["skipped_updates"] == len(steps)


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    trainer, seen = trainer_in(tmp_path), []
    parameter = next(trainer.model.parameters())

    def spoil(gradient):
        seen.append(None)
        return gradient * math.nan if len(seen) == 3 else gradient

    parameter.register_hook(spoil)
    trainer.train()
    assert trainer.non_finite_guard.skipped == 1 and len(losses(trainer)) == 8
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_a_skipped_step_leaves_weights_and_averages_as_they_were(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=3)
    spoil_loss(trainer, {3}, math.nan)
    states = []
    trainer.add_callback(At(2, lambda: states.append((weights(trainer), str(trainer.optimizer.state_dict()["state"])))))
    trainer.train()
    assert states == [(weights(trainer), str(trainer.optimizer.state_dict()["state"]))]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=50)
    trainer.non_finite_guard.max_consecutive = 10
    spoil_loss(trainer, set(range(4, 50)), math.nan)
    with pytest.raises(DivergedError, match="The last 10 steps had a non-finite loss"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert latest_valid_checkpoint(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_exactly(tmp_path, signum):
    whole, handler = trainer_in(tmp_path / "whole"), signal.getsignal(signum)
    whole.train()
    stopped = trainer_in(tmp_path / "stopped", save_steps=100)
    stopped.add_callback(At(2, lambda: os.kill(os.getpid(), signum)))
    with pytest.raises(Interrupted) as raised:
        stopped.train()
    assert raised.value.code == 128 + signum and signal.getsignal(signum) is handler
    assert 2 <= max(list_checkpoints(Path(tmp_path, "stopped", "checkpoints"))) <= 3
    resumed = trainer_in(tmp_path / "stopped", save_steps=100)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and weights(resumed) == weights(whole)


def test_a_signal_saves_a_run_that_keeps_no_checkpoints(tmp_path, caplog):
    stopped = trainer_in(tmp_path, save_steps=0)
    stopped.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(Interrupted):
        stopped.train()
    newest = latest_valid_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and f"stopped after step {newest.name[-1]} and saved" in caplog.text
    resumed = trainer_in(tmp_path, save_steps=0)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(resumed)) == 8


@pytest.mark.parametrize(("step", "newest"), [(1, 0), (5, 4)])
def test_a_run_that_was_stopped_and_could_not_be_saved_says_so(tmp_path, monkeypatch, caplog, step, newest):
    trainer = trainer_in(tmp_path, save_steps=4)

    def stop_on_a_full_disk():
        monkeypatch.setattr(fault_tolerant_trainer, "save_checkpoint", lambda *args, **kwargs: OSError("full"))
        os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(At(step, stop_on_a_full_disk))
    with pytest.raises(Interrupted):
        trainer.train()
    assert f"not saved; the same command resumes from step {newest}" in caplog.text and "and saved" not in caplog.text


def test_runs_killed_at_random_lose_nothing():
    script = Path(__file__).parents[2] / "robustness" / "kill_training.py"
    outcome = subprocess.run([sys.executable, script, "6"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["kills"] >= 6 and result["lost"] == 0
