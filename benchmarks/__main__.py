"""Benchmark our code against plain implementations and other projects. Without a name: list the benchmarks."""

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

CASES = Path(__file__).parent / "cases"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    name: Annotated[str | None, typer.Argument(help="Benchmark to run. Default: list them.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs per case.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads that torch uses.")] = 1,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file to write. Default: none.")] = None,
    peer: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Checkout of another project to import from; may be repeated. Default: none.",
        ),
    ] = None,
    tiny: Annotated[bool, typer.Option(help="Run with the smallest sizes, as a smoke test.")] = False,
) -> None:
    """Print tables, and save the results to `--out`."""
    if name is None:
        print("\n".join(f"{known:<17}{about}" for known, about in benchmarks().items()))
        return
    if name not in benchmarks():
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(benchmarks())}")
    sys.path[:0] = [str(path.resolve()) for path in peer or []]
    run(name, rounds=rounds, threads=threads, out=out, tiny=tiny)


def benchmarks() -> dict[str, str]:
    """Return the first docstring line of each benchmark, by name, from the source: an import would load torch."""
    files = sorted(path for path in CASES.glob("*.py") if path.stem != "__init__")
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in files}


def run(name: str, *, rounds: int, threads: int, out: Path | None, tiny: bool) -> None:
    """Measure and print all comparisons of a benchmark."""
    from .harness import measure
    from .report import Outcome, report

    cases = importlib.import_module(f"{__package__}.cases.{name}")
    outcomes = [
        Outcome(each.title, each.baseline, measure(each.cases, rounds=rounds, threads=threads))
        for each in cases.comparisons(tiny=tiny)
    ]
    result = report(name, outcomes, rounds=rounds)
    print(result.markdown())
    if out is not None:
        out.write_text(json.dumps(result.json(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
