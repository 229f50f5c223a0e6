"""Read recipes from YAML files and the command line."""

import math
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from .config import Recipe, RunSettings

COMMAND_LINE = "the command line"
# Keys that had another name in early recipes. They are errors; the message names the new key.
RENAMED_KEYS = {
    "adamw_scale": "adamw_lr_scale",
    "adversarial_start": "disc_start",
    "adversarial_weight": "disc_weight",
    "base": "base_model",
    "caption_share": "image_to_text_fraction",
    "compile": "torch_compile",
    "eval_every": "eval_steps",
    "eval_rows": "max_eval_samples",
    "image_weight": "image_loss_weight",
    "log_every": "logging_steps",
    "lr_schedule": "lr_scheduler_type",
    "max_rows": "max_train_samples",
    "num_workers": "dataloader_num_workers",
    "perceptual": "perceptual_model",
    "place_embeddings": "axial_position_embeddings",
    "resume": "resume_from_checkpoint",
    "sample_every": "sample_steps",
    "save_every": "save_steps",
    "start_from": "init_from",
    "start_from_codebook": "init_from_codebook",
}
RENAMED_MODEL_KEYS = {
    "commitment": "commitment_weight",
    "cosine": "use_cosine_sim",
    "ema": "ema_update",
    "error": "stage_loss",
    "num_levels": "num_quantizers",
    "projected_dim": "codebook_dim",
    "reconstruction": "reconstruction_loss",
    "revive": "replace_dead_codes (VQ-VAE) or replace_dead_options (VQ-DRAW)",
}
KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


def read_recipe(kind: type[Recipe], path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file, with some keys overridden.

    Args:
        kind: Class of the recipe.
        path: YAML file. None = all keys have their defaults.
        overrides: Values by key. `model.codebook_size` sets a key inside `model`.

    Raises:
        ValueError: For a key that does not exist or a value of the wrong type, naming the file and the key.
    """
    types = get_type_hints(kind)
    plain = {key: value for key, value in (overrides or {}).items() if "." not in key}
    values: dict[str, Any] = {}
    for origin, given in ((str(path), {} if path is None else read_yaml(path)), (COMMAND_LINE, plain)):
        check_keys(kind, given, origin)
        values |= {key: as_type(key, value, types[key], origin) for key, value in given.items()}
    for key, value in (overrides or {}).items():
        outer, dot, inner = key.partition(".")
        if dot:
            check_keys(kind, {outer: value}, COMMAND_LINE)
            if get_origin(types[outer]) is not dict:
                raise ValueError(f"{COMMAND_LINE}: no key {key!r}: {outer!r} has no settings of its own")
            values[outer] = values.get(outer, {}) | {inner: value}
    for key in values.get("model", {}):
        if key in RENAMED_MODEL_KEYS:
            raise ValueError(f"{path or COMMAND_LINE}: model.{key} is now called {RENAMED_MODEL_KEYS[key]}")
    return kind(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; a file without one is a ValueError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def check_keys(kind: type[RunSettings], values: dict[str, Any], origin: str) -> None:
    """Check that a recipe of this kind has all keys; the error names the nearest one, or the new name of an old key."""
    known = [each.name for each in fields(kind)]
    for key in values:
        if key in RENAMED_KEYS and key not in known:
            raise ValueError(f"{origin}: key {key!r} is now called {RENAMED_KEYS[key]!r}")
        if key not in known:
            from tokenizers_vq.validation import did_you_mean  # here, since it loads torch, which --help must not

            hint = did_you_mean(key, known) or f"the keys are {', '.join(known)}"
            raise ValueError(f"{origin}: no key {key!r}; {hint}")


def as_type(key: str, value: Any, wanted: Any, origin: str) -> Any:
    """Return a value in the type of its key; another type is a ValueError.

    Whole numbers pass for floats, and so does `1e-3`, which YAML reads as text.
    """
    is_truth = isinstance(value, bool)
    if wanted is float and isinstance(value, int | str) and not is_truth:
        with suppress(ValueError):
            value = float(value)
    if wanted is str and isinstance(value, int | float) and not is_truth:
        return str(value)
    plain = get_origin(wanted) or wanted
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, plain) or is_truth != (plain is bool) or not is_finite:
        raise ValueError(f"{origin}: key {key!r} must be {KIND_NAMES[plain]}, got {value!r}")
    return value


def parse_arguments(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Parse `[RECIPE.yaml] --key value --other-key=value` into the file and the values, read as YAML."""
    path = None
    if arguments and not arguments[0].startswith("--"):
        path, arguments = arguments[0], arguments[1:]
    overrides: dict[str, Any] = {}
    while arguments:
        word, *arguments = arguments
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not arguments:
                raise ValueError(f"--{key} needs a value")
            value, *arguments = arguments
        overrides[key.replace("-", "_")] = as_yaml(value)
    return path, overrides


def as_yaml(text: str) -> Any:
    """Return a value of the command line as YAML reads it; anything that is not YAML stays text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None or not isinstance(value, int | float | bool | dict | list) else value


def describe_keys(kind: type[RunSettings]) -> str:
    """Return all keys of a recipe with their defaults, for the help text."""
    lines = []
    for each in fields(kind):
        default = "" if each.default is MISSING else repr(each.default)
        lines.append(f"--{each.name.replace('_', '-')} {default}".rstrip())
    return "  ".join(lines)
