"""Checks of settings, codes and image sizes, and when the values of a tensor may be read for them.

The file has three parts:

1. Checks of a config's settings: type, range, spelling. They run once, when a config is built.
2. Checks of tensors: the range of codes, image sizes that a stride divides, finite values.
3. `should_validate`, `skip_validation` and `can_read_without_sync`, which say when values are read.

All `check_*` functions raise a ValueError that says what was expected and what came.
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
from torch import Tensor

# Upper limits of integer settings. A hostile config could otherwise ask for any amount of memory.
# Settings that count layers have a lower limit: layers are built one by one, which takes time
# before a single tensor is allocated.
MAX_INT = 2**24
MAX_LIST_LENGTH = 2**8
MAX_BY_FIELD = {"image_size": 2**13, "max_length": 2**16, "num_stages": 2**12} | {
    f"num_{layers}": MAX_LIST_LENGTH
    for layers in ("downsamples", "grids", "quantizers", "residual_blocks", "encoder_blocks", "decoder_blocks")
}
MUST_BE_POSITIVE = {"pixel_std"}  # pixels are divided by it
INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
VALIDATION_SKIPPED: ContextVar[bool] = ContextVar("validation_skipped", default=False)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the hint "did you mean 'x'?" with the most similar known name, or "" if none is."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def check_known_fields(owner: str, names: Iterable[str], known: Iterable[str], *, listed: Iterable[str]) -> None:
    """Raise an error for the first of some unknown settings.

    Args:
        owner: What has the settings, for the message.
        names: Names that `owner` does not have; nothing happens if there are none.
        known: Names that it has. The message suggests the nearest.
        listed: Names that the message lists if none is near.

    Raises:
        ValueError: If `names` is not empty.
    """
    for name in sorted(names):
        hint = did_you_mean(name, sorted(known)) or f"it has {', '.join(listed)}"
        raise ValueError(f"{owner} has no setting {name!r}; {hint}")


def check_number(owner: str, name: str, value: Any, default: Any) -> None:
    """Check a setting's value against the type of its default.

    Integers must be at least 1, or 0 if the default is 0, and at most `MAX_BY_FIELD` or `MAX_INT`.
    Floats must be finite and at least 0. Defaults of other types (lists, None) are not checked
    here.

    Args:
        owner: What has the setting, for the message.
        name: Name of the setting.
        value: The value to check.
        default: The setting's default, which tells its type.

    Raises:
        ValueError: For a value of another type or out of range: text for a number, 16.5 for 16, a
            negative count.
    """
    if isinstance(default, bool):  # before int, of which bool is a subclass
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a name"
    elif isinstance(default, int):
        least, most = min(default, 1), MAX_BY_FIELD.get(name, MAX_INT)
        fits = is_integer(value) and least <= value <= most
        expected = f"a whole number of at least {least} and at most {most}"
    elif isinstance(default, float):
        must_be_positive = name in MUST_BE_POSITIVE
        fits = is_finite_number(value) and (value > 0 if must_be_positive else value >= 0)
        expected = "a number above 0" if must_be_positive else "a number of at least 0"
    else:
        return
    if not fits:
        raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")


def is_integer(value: Any) -> TypeGuard[int]:
    """Return True for an int that is not a bool: YAML's `yes` must not pass for 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Return True for an integer or a finite float."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_counts(name: str, values: Any, *, least: int = 1) -> None:
    """Check a setting that is a list of integers.

    Args:
        name: Name of the setting, for the message.
        values: A list or tuple of 1 to `MAX_LIST_LENGTH` integers.
        least: The smallest integer allowed.

    Raises:
        ValueError: For another type, an empty or too long list, and integers out of range.
    """
    fits = isinstance(values, list | tuple) and 0 < len(values) <= MAX_LIST_LENGTH
    if not fits or not all(is_integer(value) and least <= value <= MAX_INT for value in values):
        raise ValueError(f"{name} must be whole numbers of at least {least}, got {str(values):.80}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError if a setting's value is not one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_stages(num_stages: int, segment_length: int, **counts: int) -> None:
    """Check settings of VQ-DRAW that count stages.

    Args:
        num_stages: Stages of the model.
        segment_length: Stages that share a refiner, a divisor of `num_stages`; 0 means all of them.
        counts: Other counts of stages by their name, each at most `num_stages`.

    Raises:
        ValueError: If segments do not fill the stages, or a count is too large.
    """
    if segment_length and num_stages % segment_length:
        raise ValueError(f"num_stages {num_stages} is not a multiple of segment_length {segment_length}")
    for name, count in counts.items():
        if count > num_stages:
            raise ValueError(f"{name} {count} is more than num_stages {num_stages}")


def check_code_range(codes: Tensor, codebook_size: int) -> None:
    """Check the dtype of codes, and their range where `should_validate` allows it.

    Without this check an embedding lookup would stop a GPU with an assertion, and -1 would be the
    last code.

    Raises:
        ValueError: For codes that are not integers, or not in 0..codebook_size - 1.
    """
    if codes.dtype not in INTEGER_TYPES:
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    if not should_validate(codes):
        return
    least, most = (int(extreme) for extreme in codes.aminmax())
    if least < 0 or most >= codebook_size:
        raise ValueError(f"codes must lie in 0..{codebook_size - 1}, got {least}..{most}")


def check_image_size(image_size: int, stride: int) -> None:
    """Raise a ValueError with the nearest sizes if `stride` does not divide `image_size`."""
    if image_size % stride:
        below, above = nearest_multiples(image_size, stride)
        nearest = f"nearest are {below} and {above}" if below else f"smallest is {above}"
        raise ValueError(f"image_size {image_size} is not a multiple of {stride}; the {nearest}")


def nearest_multiples(size: int, stride: int) -> tuple[int, int]:
    """Return the largest multiple of `stride` up to `size`, and the smallest from `size` on."""
    return size // stride * stride, -(-size // stride) * stride


def all_finite(values: Tensor) -> bool:
    """Return True if a tensor has no NaN and no infinity.

    Only the smallest and the largest value are tested: a NaN anywhere makes both of them NaN. On a
    CPU this takes a twentieth of the time of `values.isfinite().all()`, which writes a mask first.
    """
    # aminmax raises an error for an empty tensor.
    return not values.numel() or bool(torch.stack(values.detach().aminmax()).isfinite().all())


def should_validate(values: Tensor) -> bool:
    """Return True if values may be read for a check.

    False for an empty tensor, inside `skip_validation`, and while compiling.

    Reading a value from a GPU forces a synchronization, and inside `torch.compile` there are no
    values to read.
    """
    return values.numel() > 0 and not torch.compiler.is_compiling() and not VALIDATION_SKIPPED.get()


@contextmanager
def skip_validation() -> Iterator[None]:
    """Suspend checks of values within a `with` block, for inputs that are known to be valid.

    Shapes and dtypes are still checked, since they cost nothing. A context variable rather than a
    global: the checks of other threads, such as those of a web server, stay on.
    """
    token = VALIDATION_SKIPPED.set(True)
    try:
        yield
    finally:
        VALIDATION_SKIPPED.reset(token)


def can_read_without_sync(values: Tensor) -> bool:
    """Return True if reading needs no synchronization: on a CPU, not in a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
