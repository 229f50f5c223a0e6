"""Checkpoints of a run: which there are, which can be trusted, and that there are always some.

A checkpoint is a folder `checkpoint-STEP` that takes its name only when all of it is on the disk, with a manifest of sizes and sha256.
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from tokenizers_vq.distributed import all_reduce_sum, get_rank

from ..atomic_io import (
    TEMPORARY,
    check_manifest,
    commit_folder,
    remove_folder,
    remove_stale_temporaries,
    write_manifest,
)

logger = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"checkpoint-{step}"


def list_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints there are, oldest first."""
    named = ((NAME.fullmatch(path.name), path) for path in checkpoints.glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def latest_valid_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is what its manifest says. Those that are not are named, and removed, for nothing can use them."""
    remove_stale_temporaries(checkpoints)
    for folder in reversed(list_checkpoints(checkpoints).values()):
        try:
            check_manifest(folder)
        except ValueError as error:
            logger.warning("passed over a damaged checkpoint: %s", error)
            remove_folder(folder)
        else:
            return folder
    return None


def save_checkpoint(target: Path, write_parts: Callable[[Path], None], *, device: torch.device) -> Exception | None:
    """Build a checkpoint beside its place, each process its parts; the first one puts it there.

    Returns:
        What went wrong, in this process or another, and then nothing is left of it; None if nothing did.
    """
    building = target.with_name(f".{target.name}{TEMPORARY}")
    problem = on_all_ranks(lambda: building.mkdir(parents=True, exist_ok=True), device)
    problem = problem or on_all_ranks(lambda: write_parts(building), device)
    problem = problem or on_all_ranks(lambda: seal(building, target), device)
    if problem is not None:
        shutil.rmtree(building, ignore_errors=True)
    return problem


def seal(building: Path, target: Path) -> None:
    """In the first process: record what is there, and put it in its place."""
    if get_rank() == 0:
        write_manifest(building)
        commit_folder(building, target)


def rotate(checkpoints: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of the best step."""
    folders = list_checkpoints(checkpoints)
    for step in list(folders)[: -max(2, keep)]:
        if step != best:
            remove_folder(folders[step])


def on_all_ranks(work: Callable[[], None], device: torch.device) -> Exception | None:
    """Do a piece of work in every process, and wait for all: what went wrong in this or in another; None if nothing did."""
    problem = None
    try:
        work()
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        problem = error
    if all_reduce_sum(torch.tensor(float(problem is not None), device=device)) and problem is None:
        return OSError("another process could not write its part")
    return problem
