"""Whether what a run finds in its place is its own: the checkpoints of the same recipe, which it goes on from, or another's."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from .checkpoints import by_step
from .recipes import RunSettings
from .whole_files import remove_folder, write_atomically

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.json"
# Keys that change what a run shows, and how fast, but not where it arrives.
FREE = {"out", "resume", "log_every", "sample_every", "report_to", "num_workers", "compile"}


def checkpoints_of(recipe: RunSettings) -> Path:
    """Where a run keeps its checkpoints while it trains."""
    return Path(recipe.out, "checkpoints")


def open_run(recipe: RunSettings) -> bool:
    """Prepare the place of a run; whether there are checkpoints of the same recipe to go on from.

    Raises:
        ValueError: for checkpoints of another recipe, with the keys that differ. Another `max_steps` is only warned of: the rate of
            learning then takes another course.
    """
    folder = checkpoints_of(recipe)
    settings = json.loads(json.dumps(asdict(recipe)))
    if not recipe.resume:
        remove_folder(folder)
    resumed = bool(by_step(folder))
    if resumed:
        refuse_other_recipe(folder, settings)
    write_atomically(folder / RECIPE_FILE, (json.dumps(settings, indent=1) + "\n").encode())
    return resumed


def refuse_other_recipe(folder: Path, settings: dict[str, object]) -> None:
    """ValueError where checkpoints were made with other settings than these."""
    try:
        before = dict(json.loads((folder / RECIPE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds checkpoints of an unknown run: {ways_out()}") from error
    changed = {key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)} - FREE
    if "max_steps" in changed:
        steps = f"{before['max_steps']} to {settings['max_steps']}"
        logger.warning("max_steps changed from %s: the run goes on, but not as either would have gone", steps)
    for key in sorted(changed - {"max_steps"}):
        was, is_now = before.get(key), settings.get(key)
        raise ValueError(f"{folder} holds a run with {key} {was!r}, this one has {is_now!r}: {ways_out()}")


def ways_out() -> str:
    """What can be done about checkpoints of another run."""
    return "give --resume false to start anew, or another --out"


def close_run(recipe: RunSettings) -> None:
    """Clear the checkpoints of a run whose result is saved."""
    remove_folder(checkpoints_of(recipe))
