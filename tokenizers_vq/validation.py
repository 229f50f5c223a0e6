"""Whether numbers are numbers."""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
from torch import Tensor

# The most that a setting may be; where something is built or counted one by one, less.
MAX_INT, MOST_PARTS = 2**24, 2**8
MUST_BE_POSITIVE = {"pixel_std"}  # numbers that must not be 0
CHECKED: ContextVar[bool] = ContextVar("checked", default=False)
MAX_BY_FIELD = {"image_size": 2**13, "max_length": 2**16, "num_stages": 2**12} | {
    f"num_{parts}": MOST_PARTS
    for parts in ("downsamples", "grids", "quantizers", "residual_blocks", "encoder_blocks", "decoder_blocks")
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the hint "did you mean 'x'?" with the known name most similar to `name`, or "" if none is similar."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def check_known_fields(owner: str, names: Iterable[str], known: Iterable[str], *, listed: Iterable[str]) -> None:
    """Refuse the first of the names, none of which the owner knows, with the nearest that it does, or else those listed."""
    for name in sorted(names):
        hint = did_you_mean(name, sorted(known)) or f"it has {', '.join(listed)}"
        raise ValueError(f"{owner} has no setting {name!r}; {hint}")


def check_number(owner: str, name: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than its default: text for a number, 16.5 for 16, a count below 0 or beyond all use."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "a name"
    elif isinstance(default, int):
        least, most = min(default, 1), MAX_BY_FIELD.get(name, MAX_INT)
        fits, wanted = (
            is_integer(value) and least <= value <= most,
            f"a whole number of at least {least} and at most {most}",
        )
    elif isinstance(default, float):
        divides = name in MUST_BE_POSITIVE
        fits = is_finite_number(value) and (value > 0 if divides else value >= 0)
        wanted = "a number above 0" if divides else "a number of at least 0"
    else:
        return
    if not fits:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value!r}")


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that is finite."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_counts(name: str, values: Any, *, least: int = 1) -> None:
    """Refuse what is no list of a few whole numbers."""
    fits = isinstance(values, list | tuple) and 0 < len(values) <= MOST_PARTS
    if not fits or not all(is_integer(value) and least <= value <= MAX_INT for value in values):
        raise ValueError(f"{name} must be whole numbers of at least {least}, got {str(values):.80}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_stages(num_stages: int, segment_length: int, **counts: int) -> None:
    """Refuse segments that do not fill the stages, and counts of stages above their number."""
    if segment_length and num_stages % segment_length:
        raise ValueError(f"num_stages {num_stages} is no multiple of segment_length {segment_length}")
    for name, count in counts.items():
        if count > num_stages:
            raise ValueError(f"{name} {count} is more than num_stages {num_stages}")


def check_code_range(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes that are no integers, or that name no entry, where that is `should_validate`."""
    if codes.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    if not should_validate(codes):
        return
    least, most = (int(extreme) for extreme in codes.aminmax())
    if least < 0 or most >= codebook_size:
        raise ValueError(f"codes must lie in 0..{codebook_size - 1}, got {least}..{most}")


def check_image_size(image_size: int, stride: int) -> None:
    """Refuse a size that halving the grid does not divide, and name the nearest that it does."""
    if image_size % stride:
        below, above = nearest_multiples(image_size, stride)
        nearest = f"nearest are {below} and {above}" if below else f"smallest is {above}"
        raise ValueError(f"image_size {image_size} is no multiple of {stride}; the {nearest}")


def nearest_multiples(size: int, stride: int) -> tuple[int, int]:
    """The multiples of a stride next below and above a size that is none, or the size itself."""
    return size // stride * stride, -(-size // stride) * stride


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity, by the extremes: on a CPU in a twentieth of the time that `isfinite` of all takes."""
    return not values.numel() or bool(torch.stack(values.detach().aminmax()).isfinite().all())


@contextmanager
def skip_validation() -> Iterator[None]:
    """Within it, nobody checks what codes and images hold (their shapes and types, yes): they were checked, or are of our own making."""
    token = CHECKED.set(True)
    try:
        yield
    finally:
        CHECKED.reset(token)


def should_validate(values: Tensor) -> bool:
    """Whether there is anything to check about values, and nobody has, and it can be seen."""
    return values.numel() > 0 and not torch.compiler.is_compiling() and not CHECKED.get()


def can_read_without_sync(values: Tensor) -> bool:
    """Whether to ask what they are costs nothing: on a CPU, outside a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
