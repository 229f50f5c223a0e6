"""Kills tokenizing at random moments, starts it again, and looks whether anything is lost.

    python tests/robustness/kill_tokenization.py KILLS [SEED]

Kills the whole group of processes, the parent alone, or one worker. Prints a line of JSON, and ends with 1 if the tokens differ from those
of a job that nobody killed, more than a shard a worker was redone, a process outlived its parent by two seconds, or a file was left over.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image

from tok2img.tokenization import shards as token_shards
from tok2img.tokenization import token_dataset as tokenized
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.tokenization.token_dataset import save_tokens
from tokenizers_vq import VQVAE, VQVAEConfig

ROWS, ROWS_PER_SHARD, WORKERS = 60, 3, 2
SLOW = 0.02  # seconds more for each shard, so that there is time to kill


def setup() -> tuple[Dataset, Tok2ImgProcessor]:
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=8, num_channels=3, hidden_channels=8, code_dim=4, codebook_size=8)
    captions = [f"number {row}" for row in range(ROWS)]
    images = [Image.new("RGB", (8, 8), (row * 4, 255 - row * 4, row)) for row in range(ROWS)]
    processor = Tok2ImgProcessor.build(
        VQVAE(config), SubwordTokenizer.train_bpe(captions, vocab_size=300), text_length=8
    )
    return Dataset.from_dict({"image": images, "caption": captions}), processor


def start(data: Dataset, processor: Tok2ImgProcessor, out: Path, log: Path) -> int:
    """The job in a process, and a group, of its own; the process's number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    plain = token_shards.tokenize_shard

    def tokenize_shard(job, number, bar=None):
        time.sleep(SLOW)
        done = plain(job, number, bar)
        with open(log, "a") as file:
            file.write(f"{number}\n")
        return done

    token_shards.tokenize_shard = tokenize_shard
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            save_tokens(data, processor, out, num_proc=WORKERS)
    except BaseException as error:
        out.with_suffix(".error").write_text(repr(error))
    os._exit(0)


def members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(status.parent.name))
    return found


def kill(leader: int, draw: random.Random) -> bool:
    """Kill the group, its leader, or one worker; whether the leader is dead then."""
    what = draw.choice(["group", "parent", "worker"])
    workers = [each for each in members(leader) if each != leader]
    if what == "worker" and workers:
        os.kill(draw.choice(workers), signal.SIGKILL)
        return False
    (os.killpg if what == "group" else os.kill)(leader, signal.SIGKILL)
    return True


def main(kills: int, seed: int = 0) -> dict[str, int]:
    torch.set_num_threads(1)
    tokenized.ROWS_PER_SHARD = ROWS_PER_SHARD
    draw, total = (
        random.Random(seed),
        {"kills": 0, "jobs": 0, "different": 0, "redone": 0, "orphans": 0, "left_over": 0},
    )
    data, processor = setup()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.waitpid(start(data, processor, place / "whole", place / "log"), 0)
        expected = {file.name: file.read_bytes() for file in (place / "whole").iterdir() if file.is_file()}
        while total["kills"] < kills:
            out, log = place / f"job-{total['jobs']}", place / f"log-{total['jobs']}"
            dead, killed_here = [], 0
            while not out.is_dir():
                leader = start(data, processor, out, log)
                if killed_here < 6:
                    time.sleep(draw.uniform(0.02, 0.5))
                    killed_here += 1
                    if kill(leader, draw):
                        dead.append(leader)
                os.waitpid(leader, 0)
            total["kills"] += killed_here
            total["jobs"] += 1
            seen = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
            total["different"] += seen != expected
            redone = len(log.read_text().splitlines()) - ROWS // ROWS_PER_SHARD
            total["redone"] = max(total["redone"], redone - WORKERS * killed_here)
            time.sleep(2 if total["kills"] >= kills else 0)
            total["left_over"] += len(list(place.glob(f".{out.name}*"))) + len(list(out.rglob("*.tmp")))
        total["orphans"] = sum(len(members(leader)) for leader in dead)
    return total


if __name__ == "__main__":
    result = main(*map(int, sys.argv[1:]))
    print(json.dumps(result))
    sys.exit(result["different"] + result["orphans"] + result["left_over"] + max(0, result["redone"]) > 0)
