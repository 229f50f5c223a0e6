"""Two processes that torchrun starts, against one that does the same work alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image

from tok2img import cli
from tok2img.runs import share_of_batch
from tok2img.training_log import load_log
from tokenizers_vq.images import images_from_pixels

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
CAPTIONS = ["a red square", "a blue disc", "two green cats", "a dog on a mat", "", "a dog"]
TINY = ["--batch-size", "8", "--warmup-steps", "1", "--sample-every", "0", "--log-every", "1", "--eval-rows", "3"]
TINY_VQVAE = {"hidden_channels": 8, "num_decoder_blocks": 1, "codebook_size": 24, "code_dim": 4}


def run_on_two(arguments: list[str]) -> None:
    """Start a command under torchrun and wait for it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Thirty-five captioned pictures."""
    corners = torch.rand(35, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(corners, size=8, mode="bilinear", align_corners=True)
    rows = {"image": images_from_pixels(pixels), "caption": [CAPTIONS[row % 6] for row in range(35)]}
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def commands(data, tmp_path_factory) -> dict[str, list[str]]:
    """Runs by name: nine steps of a prior, over two epochs, with captions hidden; fifty of a VQ-VAE, in which codes fall out of use."""
    folder = tmp_path_factory.mktemp("runs")
    model = [word for key, value in TINY_VQVAE.items() for word in (f"--model.{key}", str(value))]
    tokenizer = ["train-tokenizer", "--data", data, *TINY, *model, "--max-steps", "50", "--eval-every", "25"]
    prior = ["train-prior", "--data", data, *TINY, "--max-steps", "9", "--eval-every", "3", "--depth", "1"]
    prior += ["--image-tokenizer", str(folder / "tokenizer-alone"), "--dropout", "0", "--vocab-size", "270"]
    return {"tokenizer": tokenizer, "prior": [*prior, "--caption-dropout", "0.3"]} | {"folder": [str(folder)]}


@pytest.fixture(scope="module")
def folder(commands) -> Path:
    """Where the results of all runs lie: NAME-alone of one process, NAME-pair of two."""
    folder = Path(commands.pop("folder")[0])
    for name, command in commands.items():
        cli.app([*command, "--out", str(folder / f"{name}-alone")], standalone_mode=False)
    prior = [*commands["prior"], "--batch-size", "4", "--gradient-accumulation-steps", "2"]
    cli.app([*prior, "--out", str(folder / "prior-parts")], standalone_mode=False)
    pairs = [
        {"arguments": [*command, "--out", str(folder / f"{name}-pair")], "notes": str(folder / f"{name}-pair")}
        for name, command in commands.items()
    ]
    (folder / "commands.json").write_text(json.dumps(pairs))
    run_on_two([str(Path(__file__).with_name("on_ranks.py")), str(folder / "commands.json")])
    return folder


@pytest.mark.parametrize("name", ["prior-pair", "prior-parts", "tokenizer-pair"])
def test_a_run_is_the_same_however_processes_and_parts_share_its_batches(folder, name):
    alone, shared = load_log(folder / f"{name.split('-')[0]}-alone"), load_log(folder / name)
    assert len(alone) == len(shared) > 9
    for ours, theirs in zip(alone, shared, strict=True):
        assert {key: theirs[key] for key in ours.keys() - TIMES} == pytest.approx(
            {key: ours[key] for key in ours.keys() - TIMES}, abs=1e-5, rel=1e-5
        )


def test_codebooks_and_their_averages_agree_bit_for_bit_after_every_step(folder):
    first, second = ((folder / "tokenizer-pair" / f"buffers-{rank}").read_text().split() for rank in (0, 1))
    assert first == second and len(set(first)) == 50


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValueError, match="'batch_size' is shared by 2 devices and must be a multiple of that, got 5"):
        share_of_batch(5, num_devices=2)
