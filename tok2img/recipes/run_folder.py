"""Decide whose checkpoints lie in a run's folder: those of the same recipe are resumed, others are an error."""

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path

from ..atomic_io import remove_folder, write_atomically
from ..trainer.checkpointing import list_checkpoints
from .config import RunSettings

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.json"
# Keys that may change when a run is resumed: they affect paths, logging and speed, not the result
# (up to rounding and dropout).
RESUME_SAFE_KEYS = {
    "out",
    "resume_from_checkpoint",
    "logging_steps",
    "sample_steps",
    "report_to",
    "dataloader_num_workers",
    "torch_compile",
    "fsdp",
}
RESUME_HINT = "give --resume-from-checkpoint false to train from scratch, or another --out"


def checkpoints_of(recipe: RunSettings) -> Path:
    """Return the folder in which a run keeps its checkpoints while it trains."""
    return Path(recipe.out, "checkpoints")


def can_resume(recipe: RunSettings) -> bool:
    """Return True if the run's folder holds checkpoints and the recipe wants to resume from them."""
    return recipe.resume_from_checkpoint and bool(list_checkpoints(checkpoints_of(recipe)))


def check_same_recipe(recipe: RunSettings) -> None:
    """Check that the checkpoints that a run would resume from were made by the same recipe.

    Another `max_steps` is only warned of: the learning rate then follows another schedule. Does nothing if
    there is nothing to resume.

    Raises:
        ValueError: For checkpoints of another recipe, with the key that differs.
    """
    if not can_resume(recipe):
        return
    folder, settings = checkpoints_of(recipe), to_json_dict(recipe)
    # A key that is newer than the run has its default there.
    before = {key.name: key.default for key in fields(recipe) if isinstance(key.default, bool | int | float | str)}
    try:
        before |= dict(json.loads((folder / RECIPE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds checkpoints of an unknown run: {RESUME_HINT}") from error
    changed = {key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)}
    changed -= RESUME_SAFE_KEYS
    if "max_steps" in changed:
        steps = f"{before['max_steps']} to {settings['max_steps']}"
        logger.warning(
            "max_steps changed from %s. Resuming, but the learning-rate schedule differs from both runs.", steps
        )
    for key in sorted(changed - {"max_steps"}):
        was, is_now = before.get(key), settings.get(key)
        raise ValueError(f"{folder} holds a run with {key} {was!r}, this one has {is_now!r}: {RESUME_HINT}")


def open_run(recipe: RunSettings) -> None:
    """Record the recipe next to the checkpoints to come. Without resuming, remove those of an earlier run first."""
    folder = checkpoints_of(recipe)
    if not recipe.resume_from_checkpoint:
        remove_folder(folder)
    write_atomically(folder / RECIPE_FILE, (json.dumps(to_json_dict(recipe), indent=1) + "\n").encode())


def to_json_dict(recipe: RunSettings) -> dict[str, object]:
    """Return the keys of a recipe with values as JSON gives them back (lists, not tuples)."""
    return json.loads(json.dumps(asdict(recipe)))


def close_run(recipe: RunSettings) -> None:
    """Remove the checkpoints of a run whose result is saved."""
    remove_folder(checkpoints_of(recipe))
