"""Two processes that torchrun starts, against one that does the same work alone."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from transformers import AutoModelForCausalLM, TrainingArguments

from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.training_run import training_arguments
from tok2img.tokenization import token_dataset as tokenized
from tok2img.trainer.checkpointing import latest_valid_checkpoint
from tok2img.trainer.training_log import load_log
from tokenizers_vq.images.processing import images_from_pixels

ON_RANKS = Path(__file__).with_name("launch.py")
RUN = runpy.run_path(str(ON_RANKS))["run"]
CAPTIONS = ["a red square", "a blue disc", "two green cats", "a dog on a mat", "", "a dog"]
TINY = [
    "--batch-size",
    "8",
    "--warmup-steps",
    "1",
    "--sample-steps",
    "0",
    "--logging-steps",
    "1",
    "--max-eval-samples",
    "3",
]
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
    """Thirty-five captioned images."""
    corners = torch.rand(35, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(corners, size=8, mode="bilinear", align_corners=True)
    rows = {"image": images_from_pixels(pixels), "caption": [CAPTIONS[row % 6] for row in range(35)]}
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Where runs lie: fifty steps of a VQ-VAE in which codes fall out of use, and nine of a prior, over two epochs, with captions hidden.

    NAME-alone is of one process, NAME-pair of two; of the runs of parts of a prior one begins in two and ends in one, one the other way.
    """
    folder = tmp_path_factory.mktemp("runs")
    model = [word for key, value in TINY_VQVAE.items() for word in (f"--model.{key}", str(value))]
    tokenizer = ["train-tokenizer", "--data", data, *TINY, *model, "--max-steps", "50", "--eval-steps", "25"]
    tokenizer += ["--flip", "true", "--crop", "0.7"]
    prior = ["train-prior", "--data", data, *TINY, "--max-steps", "9", "--eval-steps", "3", "--depth", "1"]
    prior += ["--image-tokenizer", str(folder / "tokenizer-alone"), "--dropout", "0", "--vocab-size", "270"]
    prior += ["--caption-dropout", "0.3"]
    parts = [*prior, "--fsdp", "true"]
    tokens = ["tokenize", data, "--tokenizer", str(folder / "tokenizer-alone"), "--vocab-size", "270"]
    alone = [
        (tokenizer, "tokenizer-alone", 0),
        (tokens, "tokens-alone", 0),
        (prior, "prior-alone", 0),
        ([*prior, "--batch-size", "4", "--gradient-accumulation-steps", "2"], "prior-twice", 0),
        (prior, "prior-alone-then-pair", 5),
    ]
    pair = [
        (tokens, "tokens-pair", 0),  # before a group of processes is there, as `tok2img tokenize` is by itself
        (tokenizer, "tokenizer-pair", 0),
        (prior, "prior-pair", 0),
        (parts, "prior-alone-then-pair", 0),
        (parts, "prior-pair-then-alone", 5),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenized, "ROWS_PER_SHARD", 4)
        for arguments, name, killed_at in alone:
            RUN(arguments, str(folder / name), killed_at)
    (folder / "commands.json").write_text(json.dumps([(each[0], str(folder / each[1]), each[2]) for each in pair]))
    run_on_two([str(ON_RANKS), str(folder / "commands.json")])
    shutil.copytree(folder / "prior-pair-then-alone", folder / "killed")
    RUN(parts, str(folder / "prior-pair-then-alone"))
    return folder


@pytest.mark.parametrize(
    "name", ["prior-twice", "prior-pair", "prior-alone-then-pair", "prior-pair-then-alone", "tokenizer-pair"]
)
def test_a_run_is_the_same_however_processes_and_batches_share_its_rows(folder, name):
    alone, shared = load_log(folder / f"{name.split('-')[0]}-alone"), load_log(folder / name)
    assert len(alone) == len(shared) > 9
    for ours, theirs in zip(alone[:-1], shared[:-1], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("of", ["tokens-{}", "prior-{}/tokens"])
def test_two_processes_make_the_same_tokens_byte_for_byte(folder, of):
    alone, pair = (contents(folder / of.format(name)) for name in ("alone", "pair"))
    assert sum(name.endswith(".parquet") for name in alone) == 9 and alone == pair
    assert not [path for path in folder.rglob(".*tokens*") if path.exists()], "nothing is left over"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_codebooks_and_their_averages_agree_bit_for_bit_after_every_step(folder):
    first, second = (json.loads((folder / f"tokenizer-pair-{rank}.json").read_text()) for rank in (0, 1))
    assert first["buffers"] == second["buffers"] and len(set(first["buffers"])) == 50


def test_processes_that_share_the_weights_hold_half_of_them_each(folder):
    first, second = (json.loads((folder / f"prior-alone-then-pair-{rank}.json").read_text()) for rank in (0, 1))
    whole = sum(parameter.numel() for parameter in load_whole(folder / "prior-alone").parameters())
    assert first["weights"][0] + second["weights"][0] == whole and first["weights"][0] < 0.6 * whole


@pytest.mark.parametrize("name", ["prior-alone-then-pair", "prior-pair-then-alone"])
def test_a_prior_trained_in_parts_is_saved_whole(folder, name):
    ours, alone = load_whole(folder / name).state_dict(), load_whole(folder / "prior-alone").state_dict()
    assert ours.keys() == alone.keys()
    assert all(torch.allclose(ours[key], alone[key], atol=1e-5) for key in ours)


def load_whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_two_processes_is_whole_and_has_one_manifest(folder):
    checkpoint = latest_valid_checkpoint(folder / "killed" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    files = {file.name for file in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "random-0.safetensors", "random-1.safetensors"} <= files
    assert set(json.loads((checkpoint / "manifest.json").read_text())["files"]) == files - {"manifest.json"}


def test_batch_that_cannot_be_shared_evenly_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda args: 2))
    assert training_arguments(PriorRecipe(out=str(tmp_path), batch_size=6)).per_device_train_batch_size == 3
    with pytest.raises(ValueError, match="'batch_size' is shared by 2 devices and must be a multiple of that, got 5"):
        training_arguments(PriorRecipe(out=str(tmp_path), batch_size=5))
