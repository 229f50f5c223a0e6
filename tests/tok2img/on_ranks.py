"""Training commands one after another, in every process that torchrun starts.

    torchrun --standalone --nproc-per-node 2 tests/tok2img/on_ranks.py COMMANDS.json

COMMANDS.json holds a list of {"arguments": of `tok2img`, "notes": folder for what each process saw of the run}.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import datasets
import torch

from tok2img import cli, prior_runs, runs
from tok2img.trainer import Trainer

torch.set_num_threads(1)
datasets.disable_progress_bars()


class Watched(Trainer):
    """Notes after each step what this process's buffers hold, codebooks and their averages."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        contents = [buffer.numpy().tobytes() for _, buffer in sorted(self.model.named_buffers())]
        seen.append(hashlib.sha256(b"".join(contents)).hexdigest())
        return loss


def run(arguments: list[str], notes: str) -> None:
    seen.clear()
    cli.app(arguments, standalone_mode=False)
    Path(notes, f"buffers-{os.environ['RANK']}").write_text("\n".join(seen))


if __name__ == "__main__":
    seen: list[str] = []
    runs.Trainer = prior_runs.Trainer = Watched
    for command in json.loads(Path(sys.argv[1]).read_text()):
        run(**command)
