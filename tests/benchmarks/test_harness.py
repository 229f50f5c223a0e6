import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app, benchmarks
from benchmarks.cases.vqdraw_original import check_equal_codes
from benchmarks.harness import Case, Comparison, Result, import_peer, measure, spread
from benchmarks.report import Outcome, report

PEER = "vector_quantize_pytorch"
ROOT = Path(__file__).parents[2]


def result(name: str, *cpu_seconds: float, peak_bytes: int = 0) -> Result:
    """A result whose wall time is three times its CPU time."""
    return Result(name, spread(list(cpu_seconds)), spread([3 * each for each in cpu_seconds]), peak_bytes)


def invoke(*arguments: str) -> str:
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.fixture
def outcome() -> Outcome:
    return Outcome("adding", "slow", [result("fast", 0.001, 0.009, 0.002, peak_bytes=5_000_000), result("slow", 0.004)])


@pytest.fixture
def own_path(monkeypatch):
    """Whatever is put on the path of modules, or imported from there under the peer's name, is gone afterwards."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, PEER, None)
    del sys.modules[PEER]


def test_rounds_are_interleaved_with_setups_before_each_run():
    order: list[str] = []

    def logged(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    measure([Case("A", logged("A"), logged("a")), Case("B", logged("B"))], rounds=2, warmup=1)
    warmup_and_rounds, memory = ["a", "A", "B"] * 3, ["a", "A", "B"]
    assert order == warmup_and_rounds + memory


def test_a_slow_case_runs_once():
    order: list[str] = []
    cases = [Case(name, lambda name=name: order.append(name), slow=name == "S") for name in "QS"]
    quick, slow = measure(cases, rounds=3, warmup=2)
    assert order == ["Q"] * 2 + ["Q", "S", "Q", "Q"] + ["Q"]
    assert (len(quick.cpu.rounds), len(slow.cpu.rounds), slow.peak_bytes) == (3, 1, None)
    table = Outcome("work", "Q", [quick, slow]).markdown().splitlines()
    assert table[-1].split(" | ")[3] == ""


def test_setup_is_not_measured():
    (measured,) = measure([Case("idle", lambda: None, lambda: sum(range(1_000_000)))], rounds=3)
    assert measured.cpu.median < 0.005


def test_there_are_as_many_seconds_as_rounds():
    (measured,) = measure([Case("idle", lambda: None)], rounds=3)
    assert len(measured.cpu.rounds) == len(measured.wall.rounds) == 3


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure([Case("idle", lambda: None)], rounds=0)


def test_a_spread_has_median_least_and_most():
    measured = spread([3.0, 1.0, 2.0, 9.0])
    assert (measured.median, measured.min, measured.max, measured.rounds) == (2.5, 1.0, 9.0, [3.0, 1.0, 2.0, 9.0])


def test_twice_the_work_takes_about_twice_the_cpu_time():
    once, twice = measure(
        [Case("once", lambda: sum(range(200_000))), Case("twice", lambda: sum(range(400_000)))], rounds=9
    )
    assert 1.4 < twice.cpu.median / once.cpu.median < 2.8


def test_peak_memory_is_what_a_run_holds_at_most_not_what_it_leaves():
    small, large = measure(
        [Case("small", lambda: None), Case("large", lambda: torch.ones(10_000_000).sum().item())], rounds=1
    )
    assert small.peak_bytes < 5e6 < 35e6 < large.peak_bytes < 50e6


def test_memory_freed_by_one_case_does_not_hide_that_of_the_next():
    def fill() -> int:
        return len([torch.ones(2_000) for _ in range(2_000)])

    first, second = measure([Case("first", fill), Case("second", fill)], rounds=1)
    assert first.peak_bytes > 12e6 and second.peak_bytes > 12e6


@pytest.mark.parametrize(("names", "baseline"), [("ab", "c"), ("aa", "a")])
def test_a_comparison_needs_its_baseline_and_different_names(names, baseline):
    with pytest.raises(ValueError, match="names must differ and hold the baseline"):
        Comparison("title", [Case(name, lambda: None) for name in names], baseline)


def test_the_table_has_medians_in_milliseconds_and_ratios_to_the_baseline(outcome):
    fast, slow = outcome.markdown().splitlines()[-2:]
    assert fast == "| fast | 2.0 (1.0..9.0) | 6.0 (3.0..27.0) | 5.0 | 0.50 | 0.50 |"
    assert slow == "| slow | 4.0 (4.0..4.0) | 12.0 (12.0..12.0) | 0.0 | 1.00 | 1.00 |"


def test_all_lines_of_a_table_have_as_many_cells(outcome):
    table = [line for line in outcome.markdown().splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_json_holds_the_results_and_what_they_were_measured_with(outcome):
    saved = json.loads(json.dumps(report("sums", [outcome], rounds=3).json()))
    assert saved["torch"] == torch.__version__ and saved["threads"] == torch.get_num_threads()
    assert {"date", "cpu", "rounds"} <= saved.keys()
    assert saved["outcomes"][0]["results"][0]["cpu"]["rounds"] == [0.001, 0.009, 0.002]


def test_a_missing_peer_is_skipped_with_a_line_that_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PEER, None)
    assert import_peer(PEER) is None
    assert capsys.readouterr().err.startswith(f"skipped {PEER}: ")


def test_a_peer_may_lack_what_it_imports_but_is_not_measured(own_path, tmp_path):
    (tmp_path / f"{PEER}.py").write_text("from absent.part import Thing\nclass Kept(Thing): size = 3\n")
    sys.path.insert(0, str(tmp_path))
    assert import_peer(PEER) is None
    assert import_peer(PEER, unused=["absent.part"]).Kept.size == 3
    assert "absent.part" not in sys.modules


def test_without_the_peer_its_row_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, PEER, None)
    output = invoke("quantizer", "--tiny", "--rounds", "1")
    assert f"skipped {PEER}" in output and "| ours |" in output and "| vector-quantize" not in output


def test_a_peer_can_be_a_checkout(own_path, tmp_path):
    stand_in = "from torch import nn\n"
    stand_in += "class VectorQuantize(nn.Module):\n    def __init__(self, **_): super().__init__()\n"
    stand_in += "    def forward(self, x): return x, x, x.sum()\n"
    stand_in += "class ResidualVQ(VectorQuantize):\n    layers = ()\n"
    (tmp_path / f"{PEER}.py").write_text(stand_in)
    assert "| vector-quantize-pytorch |" in invoke("quantizer", "--tiny", "--rounds", "1", "--peer", str(tmp_path))


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_runs_and_writes_its_results(name, tmp_path):
    output = invoke(name, "--tiny", "--rounds", "1", "--out", str(tmp_path / "results.json"))
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert outcomes and all(f"### {each['title']}" in output for each in outcomes)


@pytest.mark.parametrize("name", ["quantizer", "vqdraw"])
def test_what_is_compared_gives_the_same(name):
    for comparison in import_module(f"benchmarks.cases.{name}").comparisons(tiny=True):
        answers = []
        for case in comparison.cases:
            if case.setup is not None:
                case.setup()
            answers.append(case.run())
        if comparison.baseline == "matrix product":  # which is only a part of the work
            continue
        for answer in answers:
            torch.testing.assert_close(answer, answers[0])


def test_an_unknown_benchmark_is_refused_with_the_names():
    answer = CliRunner().invoke(app, ["nothing"])
    assert answer.exit_code == 2
    assert all(name in answer.output for name in benchmarks())


def test_the_list_comes_without_torch():
    script = (
        "import sys; from typer.testing import CliRunner; from benchmarks.__main__ import app; "
        "print(CliRunner().invoke(app).output, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "quantizer  " in answer.stdout and answer.stdout.rstrip().endswith("[]"), answer.stderr


def test_codes_that_the_peer_has_not_are_refused():
    codes = torch.tensor([[1, 2], [3, 4]])
    check_equal_codes(codes, codes.clone())
    with pytest.raises(ValueError, match="1 of 4 codes are not those of the peer"):
        check_equal_codes(codes, torch.tensor([[1, 2], [0, 4]]))
