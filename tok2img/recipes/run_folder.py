"""Whether what a run finds in its place is its own: the checkpoints of the same recipe, which it goes on from, or another's."""

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path

from ..atomic_io import remove_folder, write_atomically
from ..trainer.checkpointing import list_checkpoints
from .config import RunSettings

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.json"
# Keys that change where a run lies, what it shows and how fast it is; where it arrives only by rounding and by what dropout draws.
FREE = {
    "out",
    "resume_from_checkpoint",
    "logging_steps",
    "sample_steps",
    "report_to",
    "dataloader_num_workers",
    "torch_compile",
    "fsdp",
}


def checkpoints_of(recipe: RunSettings) -> Path:
    """Where a run keeps its checkpoints while it trains."""
    return Path(recipe.out, "checkpoints")


def goes_on(recipe: RunSettings) -> bool:
    """Whether there are checkpoints of the same recipe to go on from.

    Raises:
        ValueError: for checkpoints of another recipe, with the keys that differ. Another `max_steps` is only warned of: the rate of
            learning then takes another course.
    """
    resumed = recipe.resume_from_checkpoint and bool(list_checkpoints(checkpoints_of(recipe)))
    if resumed:
        refuse_other_recipe(recipe)
    return resumed


def open_run(recipe: RunSettings) -> None:
    """Say whose the checkpoints are that will come; those of before go, where the recipe says to start anew."""
    folder = checkpoints_of(recipe)
    if not recipe.resume_from_checkpoint:
        remove_folder(folder)
    write_atomically(folder / RECIPE_FILE, (json.dumps(plain(recipe), indent=1) + "\n").encode())


def plain(recipe: RunSettings) -> dict[str, object]:
    """The keys of a recipe as JSON gives them back."""
    return json.loads(json.dumps(asdict(recipe)))


def defaults(recipe: RunSettings) -> dict[str, object]:
    """What the keys of such a recipe are where nobody gives them: also in a run from before there was a key."""
    return {key.name: key.default for key in fields(recipe) if isinstance(key.default, bool | int | float | str)}


def refuse_other_recipe(recipe: RunSettings) -> None:
    """ValueError where a run's checkpoints were made by another recipe."""
    folder, settings = checkpoints_of(recipe), plain(recipe)
    try:
        before = defaults(recipe) | dict(json.loads((folder / RECIPE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds checkpoints of an unknown run: {resume_hint()}") from error
    changed = {key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)} - FREE
    if "max_steps" in changed:
        steps = f"{before['max_steps']} to {settings['max_steps']}"
        logger.warning("max_steps changed from %s: the run goes on, but not as either would have gone", steps)
    for key in sorted(changed - {"max_steps"}):
        was, is_now = before.get(key), settings.get(key)
        raise ValueError(f"{folder} holds a run with {key} {was!r}, this one has {is_now!r}: {resume_hint()}")


def resume_hint() -> str:
    """What can be done about checkpoints of another run."""
    return "give --resume-from-checkpoint false to start anew, or another --out"


def close_run(recipe: RunSettings) -> None:
    """Clear the checkpoints of a run whose result is saved."""
    remove_folder(checkpoints_of(recipe))
