"""Measure several implementations of the same work under equal conditions.

Rounds are interleaved (A B C A B C ...), so that other load on the machine affects all cases
alike. CPU time is that of the
process, with all its threads. Peak memory is the growth of the peak resident size in one further run. Linux resets that
peak (VmHWM) when 5 is written to /proc/self/clear_refs, so no sampling is needed. Two settings of glibc make it
repeatable. `malloc_trim` first returns free memory to the system; a run that reuses it would seem to need less. Large
blocks get pages of their own; otherwise gaps left by earlier runs would count.
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

# As `import tok2img` sets it, for all cases alike.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@dataclass(frozen=True)
class Case:
    """One implementation of the work.

    Attributes:
        name: Name in the tables.
        run: The work.
        setup: Called before every run and not measured.
        slow: Run only once, in the first round, without a warmup and without measuring memory.
    """

    name: str
    run: Callable[[], object]
    setup: Callable[[], object] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Comparison:
    """Implementations of the same work, one of which is the baseline."""

    title: str
    cases: Sequence[Case]
    baseline: str

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if self.baseline not in names or len(set(names)) < len(names):
            raise ValueError(f"{self.title}: names must differ and hold the baseline {self.baseline!r}, got {names}")


@dataclass(frozen=True)
class Spread:
    """Seconds of every round, with their median and range."""

    median: float
    min: float
    max: float
    rounds: list[float]


@dataclass(frozen=True)
class Result:
    """Measurements of a case: CPU and wall time, and peak memory in bytes (None for a slow case)."""

    name: str
    cpu: Spread
    wall: Spread
    peak_bytes: int | None


def measure(cases: Sequence[Case], *, rounds: int, threads: int = 1, warmup: int = 1) -> list[Result]:
    """Run every case `warmup` times unmeasured, `rounds` times for its time, and once more for its memory."""
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
    """Exclude the objects that imports created from garbage collection, which would take 0.2 s before every run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(case: Case) -> tuple[float, float]:
    """Measure the CPU and wall seconds of one run."""
    prepare(case)
    wall, cpu = time.perf_counter(), time.process_time()
    case.run()
    return time.process_time() - cpu, time.perf_counter() - wall


def prepare(case: Case) -> None:
    """Set up a run, and collect the garbage of earlier runs."""
    if case.setup is not None:
        case.setup()
    gc.collect()


def spread(seconds: list[float]) -> Spread:
    """Summarize the rounds by median, minimum and maximum."""
    return Spread(median(seconds), min(seconds), max(seconds), seconds)


def peak_extra_memory(case: Case) -> int:
    """Measure by how many bytes one run raises the peak memory of the process."""
    prepare(case)
    with large_blocks_apart():
        GLIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water_mark()
        case.run()
        return high_water_mark() - before


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Give each large block pages of its own, returned to the system with it; afterwards call `keep_large_blocks`."""
    GLIBC.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        keep_large_blocks()


def keep_large_blocks() -> None:
    """Let glibc keep freed memory. A new process would request the same pages repeatedly, which can double a time."""
    GLIBC.mallopt(M_MMAP_THRESHOLD, 2**25)
    GLIBC.mallopt(M_TRIM_THRESHOLD, 2**26)


def high_water_mark() -> int:
    """Return the peak resident size in bytes since the last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


class Unused(ModuleType):
    """Placeholder for a module that a peer imports but no benchmark uses: every name in it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_peer(module: str, *, unused: Sequence[str] = ()) -> ModuleType | None:
    """Import another project's module, or print a line and return None.

    `unused` modules are replaced by placeholders.
    """
    sys.modules.update({name: Unused(name) for name in unused})
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"skipped {module}: {error}", file=sys.stderr)
        return None
    finally:
        for name in unused:
            del sys.modules[name]
