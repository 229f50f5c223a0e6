"""Save the log of a training run next to the trained model, so that its curves can be drawn later."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic_io import write_atomically

LOG_FILE = "training_log.json"


def save_log(log_history: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Write the `log_history` of a `transformers.Trainer`, one entry a line. Non-finite numbers become null."""
    lines = [json.dumps(replace_non_finite(entry)) for entry in log_history]
    write_atomically(Path(folder, LOG_FILE), ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def load_log(folder: str | Path) -> list[dict[str, Any]]:
    """Read the entries that `save_log` wrote; an empty list if there is no log.

    Raises:
        ValueError: If the file is not a training log.
    """
    path = Path(folder, LOG_FILE)
    if not path.is_file():
        return []
    try:
        log = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{path} is not a training log: expected a list of entries")
    return log


def replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity by None, in lists and mappings too: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {name: replace_non_finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
