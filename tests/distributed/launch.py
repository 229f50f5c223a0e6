"""Training commands one after another, in every process that torchrun starts.

    torchrun --standalone --nproc-per-node 2 tests/distributed/launch.py COMMANDS.json

COMMANDS.json holds lists of what `run` takes. A run writes what this process saw of it into a file beside its result.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from tok2img.cli import app
from tok2img.recipes import train_prior as prior_runs
from tok2img.recipes import train_tokenizer as runs
from tok2img.tokenization import token_dataset as tokenized
from tok2img.trainer.trainer import Trainer


class Killed(BaseException):
    """Stands for a process that ends here."""


def run(arguments: list[str], out: str, killed_at: int = 0) -> None:
    """Run a command of `tok2img` with its `--out`, as if it were killed in the step after `killed_at`."""
    buffers, held = [], set()

    class Watched(Trainer):
        """Records the buffers after each step, and how many weights this process holds."""

        def create_accelerator_and_postprocess(self) -> None:
            """Share the weights among processes on CPUs too, where accelerate 1.15 quietly gives each all of them."""
            super().create_accelerator_and_postprocess()
            state, plugin = self.accelerator.state, self.args.fsdp_plugin_args
            if plugin and state.distributed_type == DistributedType.MULTI_CPU:
                state.distributed_type = DistributedType.FSDP
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
                self.is_fsdp_enabled = True

        def training_step(self, *args, **kwargs):
            if killed_at and self.state.global_step == killed_at:
                raise Killed
            loss = super().training_step(*args, **kwargs)
            contents = [buffer.numpy().tobytes() for _, buffer in sorted(self.model.named_buffers())]
            buffers.append(hashlib.sha256(b"".join(contents)).hexdigest())
            parts = [each.to_local() if isinstance(each, DTensor) else each for each in self.model.parameters()]
            held.add(sum(part.numel() for part in parts))
            return loss

    runs.Trainer = prior_runs.Trainer = Watched
    try:
        app([*arguments, "--out", out], standalone_mode=False)
    except Killed:
        pass
    finally:
        runs.Trainer = prior_runs.Trainer = Trainer
    seen = {"buffers": buffers, "weights": sorted(held)}
    Path(f"{out}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    tokenized.ROWS_PER_SHARD = 4
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for command in json.loads(Path(sys.argv[1]).read_text()):
        run(*command)
