"""Kills training runs at random moments, starts them again, and looks whether anything is lost.

    python tests/robustness/kill_training.py KILLS [SEED]

Runs of a prior and of a VQ-VAE, killed by SIGKILL until KILLS are spent. Prints a line of JSON, and ends with 1 if a run did not go on,
went back further than one checkpoint, left a visible checkpoint that is damaged, or differed in a bit from the run that nobody killed.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from tok2img.atomic_io import check_manifest
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe, RunSettings
from tok2img.recipes.training_run import training_arguments
from tok2img.tokenization.layout import SequenceLayout
from tok2img.trainer.checkpointing import list_checkpoints
from tok2img.trainer.trainer import Trainer
from tokenizers_vq import VQVAE, VQVAEConfig

LAYOUT = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
SAVE_EVERY, STEPS = 4, 20


class WriteLosses(TrainerCallback):
    """Appends every step's loss, to its last bit, to a file that outlives the process."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with open(self.path, "a") as file:
                file.write(f"{state.global_step} {struct.pack('>d', logs['loss']).hex()}\n")


def settings_of(kind, out: Path, **more):
    values = {
        "out": str(out),
        "max_steps": STEPS,
        "batch_size": 4,
        "warmup_steps": 1,
        "sample_steps": 0,
        "logging_steps": 1,
    }
    return kind(**(values | {"eval_steps": 0, "save_steps": SAVE_EVERY} | more))


def prior_trainer(out: Path) -> Trainer:
    recipe = settings_of(PriorRecipe, out, dropout=0.1)
    generator = torch.Generator().manual_seed(0)
    columns = {"text_ids": (11, 3), "image_codes": (6, 4)}
    rows = {
        name: torch.randint(high, (10, size), generator=generator).tolist() for name, (high, size) in columns.items()
    }
    model = PriorWithLoss(build_prior(LAYOUT, depth=1, dropout=0.1), LAYOUT, caption_dropout=0.5)
    return Trainer(model, training_arguments(recipe), train_dataset=Dataset.from_dict(rows).with_format("torch"))


def tokenizer_trainer(out: Path) -> Trainer:
    recipe = settings_of(RunSettings, out)
    pixels = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": row} for row in pixels]
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=8, num_channels=1, hidden_channels=8, code_dim=4, codebook_size=8)
    return Trainer(VQVAE(config), training_arguments(recipe), train_dataset=rows)


def train(make: Callable[[Path], Trainer], out: Path) -> None:
    trainer = make(out)
    trainer.add_callback(WriteLosses(out / "losses"))
    trainer.train(resume_from_checkpoint=True)
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(state.items())))
    (out / "weights").write_text(digest.hexdigest())


def in_a_child(make: Callable[[Path], Trainer], out: Path) -> int:
    """Start the run, or go on with it, in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            train(make, out)
    except BaseException as error:
        (out / "error").write_text(repr(error))
    os._exit(0)


def kill_until_done(
    make: Callable[[Path], Trainer], out: Path, *, seconds: float, kills: int, draw: random.Random
) -> int:
    """Start and kill a run until it ends by itself or has been killed so often; how often it was."""
    for killed in range(kills):
        child, until = in_a_child(make, out), time.monotonic() + draw.uniform(0.1, seconds)
        while time.monotonic() < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                return killed
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for checkpoint in list_checkpoints(out / "checkpoints").values():
            check_manifest(checkpoint)
    os.waitpid(in_a_child(make, out), 0)
    return kills


def compare(killed: Path, whole: Path) -> dict[str, int]:
    """What differs between a run that was killed and one that was not."""
    expected = dict(line.split() for line in (whole / "losses").read_text().splitlines())
    seen = [line.split() for line in (killed / "losses").read_text().splitlines() if line.count(" ") == 1]
    steps = [int(step) for step, _ in seen]
    back = [now - then for now, then in zip(steps, steps[1:], strict=False) if then <= now]
    finished = (killed / "weights").is_file()
    return {
        "lost": int(not finished or (killed / "error").exists()),
        "other_losses": sum(expected[step] != loss for step, loss in seen),
        "other_weights": int(not finished or (killed / "weights").read_text() != (whole / "weights").read_text()),
        "most_steps_redone": max([0, *(step + 1 for step in back)]),
    }


def main(kills: int, seed: int = 0) -> dict[str, int]:
    torch.set_num_threads(1)
    draw, total = random.Random(seed), {"kills": 0, "runs": 0}
    with tempfile.TemporaryDirectory() as folder:
        places = {make: Path(folder, make.__name__) for make in (prior_trainer, tokenizer_trainer)}
        seconds = {}
        for make, place in places.items():
            (place / "whole").mkdir(parents=True)
            started = time.monotonic()
            os.waitpid(in_a_child(make, place / "whole"), 0)
            seconds[make] = time.monotonic() - started
        while total["kills"] < kills:
            for make, place in places.items():
                out = place / f"run-{total['runs']}"
                out.mkdir()
                budget = max(1, min(8, kills - total["kills"]))
                total["kills"] += kill_until_done(make, out, seconds=seconds[make], kills=budget, draw=draw)
                total["runs"] += 1
                for name, value in compare(out, place / "whole").items():
                    total[name] = (
                        max(total.get(name, 0), value) if name.startswith("most") else total.get(name, 0) + value
                    )
    return total


if __name__ == "__main__":
    result = main(*map(int, sys.argv[1:]))
    print(json.dumps(result))
    bad = result["lost"] + result["other_losses"] + result["other_weights"]
    sys.exit(bad > 0 or result["most_steps_redone"] > SAVE_EVERY)
