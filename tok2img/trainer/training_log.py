"""The log of a training run, kept beside what was trained, so that its curves can be drawn later."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic_io import write_atomically

LOG_FILE = "training_log.json"


def save_log(log_history: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Write the `log_history` of a `transformers.Trainer`, an entry a line; a number that is not finite becomes null, for JSON has none."""
    lines = [json.dumps(finite(entry)) for entry in log_history]
    write_atomically(Path(folder, LOG_FILE), ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def load_log(folder: str | Path) -> list[dict[str, Any]]:
    """The entries that `save_log` wrote, empty where a folder has no log; ValueError for a file that is none."""
    path = Path(folder, LOG_FILE)
    if not path.is_file():
        return []
    try:
        log = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{path} is no training log: expected a list of entries")
    return log


def finite(value: Any) -> Any:
    """None for a number that is not finite, in lists and mappings too."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
