"""Reports of benchmarks: JSON with every round, and Markdown tables with ratios to the baseline."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .harness import Result

MILLISECONDS = 1e3
MEGABYTE = 1e6
HEADINGS = ("CPU ms", "wall ms", "peak extra MB", "CPU ratio", "wall ratio")


@dataclass(frozen=True)
class Outcome:
    """Results of a comparison."""

    title: str
    baseline: str
    results: list[Result]

    def markdown(self) -> str:
        """Format a table with the ratios of medians to the baseline."""
        baseline = next(result for result in self.results if result.name == self.baseline)
        rows = [(f"relative to {self.baseline}", *HEADINGS), ("---", *["---:"] * len(HEADINGS))]
        rows += [(result.name, *table_cells(result, baseline)) for result in self.results]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


@dataclass(frozen=True)
class Report:
    """Outcomes of a benchmark, with the machine and the settings."""

    benchmark: str
    date: str
    cpu: str
    torch: str
    threads: int
    rounds: int
    outcomes: list[Outcome]

    def json(self) -> dict[str, Any]:
        """Return all fields as a dictionary, including the seconds of every round."""
        return asdict(self)

    def markdown(self) -> str:
        """Format a line about the machine, and a table for each comparison."""
        settings = (
            f"{self.date}, {self.cpu}, {self.threads} thread(s), torch {self.torch}; medians of {self.rounds} round(s)"
        )
        return "\n\n".join([f"## {self.benchmark}", settings, *(outcome.markdown() for outcome in self.outcomes)])


def report(benchmark: str, outcomes: list[Outcome], *, rounds: int) -> Report:
    """Create a report of outcomes that were just measured on this machine."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return Report(benchmark, now, cpu_name(), torch.__version__, torch.get_num_threads(), rounds, outcomes)


def cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table_cells(result: Result, baseline: Result) -> list[str]:
    """Format the cells of a row after the name."""
    ratios = result.cpu.median / baseline.cpu.median, result.wall.median / baseline.wall.median
    times = [
        f"{kind.median * MILLISECONDS:.1f} ({kind.min * MILLISECONDS:.1f}..{kind.max * MILLISECONDS:.1f})"
        for kind in (result.cpu, result.wall)
    ]
    peak = "" if result.peak_bytes is None else f"{result.peak_bytes / MEGABYTE:.1f}"
    return [*times, peak, *(f"{ratio:.2f}" for ratio in ratios)]
