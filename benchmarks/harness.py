"""Measures the same work done in several ways, fairly.

Rounds are interleaved (A B C A B C ...), so that what else the machine does falls on all alike. CPU time is that of the process, with
all its threads. Peak memory is what one further run adds to the resident size at its highest: Linux sets that mark (VmHWM) back when
5 is written to /proc/self/clear_refs, so nothing has to sample. Memory freed before goes back to the system first (`malloc_trim` of
glibc); otherwise a run that finds it would look thrifty. Large blocks come from the system one by one meanwhile; otherwise gaps between
them, which what ran before has left or not, would count as well.
"""

import ctypes
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

import torch

GLIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE_BLOCK = 2**18

# As `import tok2img` sets it, for whoever is measured.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@dataclass(frozen=True)
class Case:
    """One way to do the work; `setup` comes before every run and is not measured.

    A `slow` one runs once, in the first round: nothing warms it up, and its memory is not measured.
    """

    name: str
    run: Callable[[], object]
    setup: Callable[[], object] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same work, one of which, `baseline`, is what the others are held against."""

    title: str
    cases: Sequence[Case]
    baseline: str

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if self.baseline not in names or len(set(names)) < len(names):
            raise ValueError(f"{self.title}: names must differ and hold the baseline {self.baseline!r}, got {names}")


@dataclass(frozen=True)
class Spread:
    """Seconds of every round, and what stands for them."""

    median: float
    min: float
    max: float
    rounds: list[float]


@dataclass(frozen=True)
class Result:
    """What a case took: seconds by round, and bytes on top of what the process held before, None for a slow one."""

    name: str
    cpu: Spread
    wall: Spread
    peak_bytes: int | None


def measure(cases: Sequence[Case], *, rounds: int, threads: int = 1, warmup: int = 1) -> list[Result]:
    """Run every case `warmup` times unmeasured, `rounds` times on the clock, and once more for its memory."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    torch.set_num_threads(threads)
    keep_large_blocks()
    with standing_objects_frozen():
        quick = [case for case in cases if not case.slow]
        for _ in range(warmup):
            for case in quick:
                timed(case)
        times: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases}
        for number in range(rounds):
            for case in quick if number else cases:
                times[case.name].append(timed(case))
        peaks = {case.name: peak_extra_memory(case) for case in quick}
    results = []
    for name, seconds in times.items():
        cpu, wall = (spread(list(kind)) for kind in zip(*seconds, strict=True))
        results.append(Result(name, cpu, wall, peaks.get(name)))
    return results


@contextmanager
def standing_objects_frozen() -> Iterator[None]:
    """Keep the garbage collector off what torch and transformers made on import: 0.2 s before every run otherwise."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(case: Case) -> tuple[float, float]:
    """CPU and wall seconds of one run."""
    prepare(case)
    wall, cpu = time.perf_counter(), time.process_time()
    case.run()
    return time.process_time() - cpu, time.perf_counter() - wall


def prepare(case: Case) -> None:
    """Set up a run, and collect garbage that is not its own."""
    if case.setup is not None:
        case.setup()
    gc.collect()


def spread(seconds: list[float]) -> Spread:
    """Median, least and most of the rounds."""
    return Spread(median(seconds), min(seconds), max(seconds), seconds)


def peak_extra_memory(case: Case) -> int:
    """Bytes that one run adds at its highest to what the process holds before it."""
    prepare(case)
    with large_blocks_apart():
        GLIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water_mark()
        case.run()
        return high_water_mark() - before


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Give each large block pages of its own, which go back to the system with it; then `keep_large_blocks`."""
    GLIBC.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        keep_large_blocks()


def keep_large_blocks() -> None:
    """Let glibc keep as much as it ever does: a young process asks for the same pages again and again, which can double a time."""
    GLIBC.mallopt(M_MMAP_THRESHOLD, 2**25)
    GLIBC.mallopt(M_TRIM_THRESHOLD, 2**26)


def high_water_mark() -> int:
    """Most bytes that the process has had resident since the mark was last set back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


class Unused(ModuleType):
    """A module that a peer imports and nothing measured runs through: every name in it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_peer(module: str, *, unused: Sequence[str] = ()) -> ModuleType | None:
    """Another project's module; None, and a line that says so, where it cannot be imported. `unused` modules need not be there."""
    sys.modules.update({name: Unused(name) for name in unused})
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"skipped {module}: {error}", file=sys.stderr)
        return None
    finally:
        for name in unused:
            del sys.modules[name]
