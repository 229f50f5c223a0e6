"""Write checkpoints atomically, and find the newest one that verifies.

A checkpoint is a folder `checkpoint-STEP`. It gets this name by one rename, after everything in it is on
the disk together with a manifest of sizes and SHA-256 sums.
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


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"checkpoint-{step}"


def list_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Return all checkpoints in a folder by their step, oldest first."""
    named = ((NAME.fullmatch(path.name), path) for path in checkpoints.glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def latest_valid_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose manifest verifies, or None. Damaged ones are named and removed."""
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


def save_checkpoint(target: Path, write_files: Callable[[Path], None], *, device: torch.device) -> Exception | None:
    """Write a checkpoint next to its place and rename it there. All processes have to call this.

    Args:
        target: Folder of the checkpoint.
        write_files: Writes the files of this process into a folder.
        device: Device of the tensors by which processes agree.

    Returns:
        The error of this or another process, after which nothing is left of the checkpoint; None if it was written.
    """

    def commit() -> None:
        if get_rank() == 0:
            write_manifest(building)
            commit_folder(building, target)

    building = target.with_name(f".{target.name}{TEMPORARY}")
    problem = None
    for step in (lambda: building.mkdir(parents=True, exist_ok=True), lambda: write_files(building), commit):
        problem = run_on_all_ranks(step, device)
        if problem is not None:
            shutil.rmtree(building, ignore_errors=True)
            break
    return problem


def rotate_checkpoints(checkpoints: Path, *, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep` (at least 2) and that of the best step."""
    folders = list_checkpoints(checkpoints)
    for step in list(folders)[: -max(2, keep)]:
        if step != best:
            remove_folder(folders[step])


def run_on_all_ranks(work: Callable[[], None], device: torch.device) -> Exception | None:
    """Call `work` in every process and wait for all of them.

    Returns:
        The error of this process, or an `OSError` if another one failed; None if no process failed.
    """
    problem = None
    try:
        work()
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        problem = error
    if all_reduce_sum(torch.tensor(float(problem is not None), device=device)) and problem is None:
        return OSError("another process could not write its part")
    return problem
