"""The README's Python runs, on a model made in seconds."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_is_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_paragraphs_are_at_most_four_lines():
    prose = re.sub(r"```.*?```", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    paragraphs = [block for block in prose.split("\n\n") if not block.lstrip().startswith(("|", "-", "!", "#"))]
    assert len(paragraphs) > 5 and max(len(block.strip().splitlines()) for block in paragraphs) <= 4


def test_readme_links_point_to_files():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8"))
    assert targets and [target for target in targets if not (README.parent / target).exists()] == []


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tok2img.cli.demo import run_demo

    folder = tmp_path_factory.mktemp("readme")
    run_demo(folder / "runs" / "demo", quick=True)
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_python_of_the_readme_runs(block: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(demo_folder)
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102


def test_the_quick_demo_leaves_what_the_demo_promises(demo_folder: Path):
    left = {path.name for path in (demo_folder / "runs" / "demo").iterdir()}
    assert {"samples.png", "reconstructions.png", "stages.png", "metrics.json", "model"} <= left


def test_a_second_demo_reuses_what_is_done(demo_folder: Path, capsys: pytest.CaptureFixture[str]):
    from tok2img.cli.demo import run_demo

    weights = demo_folder / "runs" / "demo" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run_demo(demo_folder / "runs" / "demo", quick=True)
    assert weights.stat().st_mtime_ns == before
    assert "exists already" in capsys.readouterr().out
