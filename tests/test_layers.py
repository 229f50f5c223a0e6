"""The rules that keep the code readable and safe, checked on its source."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenizers_vq", "tok2img", "training")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_WORDS = {"extractall", "trust_remote_code", "allow_pickle", "unsafe_load", "full_load"}


def imported_modules(path: Path) -> set[str]:
    """Full names of every module and every `from` name that a file imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def called_names(path: Path) -> set[str]:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {ast.unparse(function) for function in calls}


def words_of(path: Path) -> Iterator[str]:
    """Attributes, names of arguments and plain names that a file uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name | ast.keyword):
            yield str(
                node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else node.arg
            )


def public_names(package: str) -> list[tuple[str, str]]:
    return [(package, name) for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize(
    ("package", "forbidden"), [("tokenizers_vq", {"tok2img", "training"}), ("tok2img", {"training"})]
)
def test_imports_between_packages_point_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        assert not forbidden & {name.split(".")[0] for name in imported_modules(path)}, path.name


def test_the_vqdraw_algorithm_imports_no_refiner_and_no_modality():
    ours = {name for name in imported_modules(ROOT / "tokenizers_vq/vqdraw.py") if name.startswith("tokenizers_vq")}
    assert {name.split(".")[1] for name in ours} <= {"options", "clustering", "ranks"}


def test_generation_imports_neither_processing_nor_the_tokenizers():
    names = imported_modules(ROOT / "tok2img/generation.py")
    assert not {name for name in names if name.startswith(("tok2img.processing", "tokenizers_vq"))}


@pytest.mark.parametrize(("package", "name"), public_names("tokenizers_vq") + public_names("tok2img"))
def test_every_public_name_has_a_docstring(package, name):
    documentation = getattr(importlib.import_module(package), name).__doc__
    assert documentation and not documentation.startswith(f"{name}("), "a dataclass without one gets its signature"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
class TestEveryFile:
    def test_is_at_most_350_lines(self, path):
        assert len(path.read_text().splitlines()) <= 350

    def test_is_named_after_its_idea(self, path):
        assert path.stem not in {"utils", "helpers", "common", "util", "misc"}

    def test_runs_nothing_that_it_reads(self, path):
        modules = {name.split(".")[0] for name in imported_modules(path)}
        assert not modules & {"pickle", "dill", "cloudpickle", "joblib"}
        allowed = {"torch.load"} if path.name == "pt_checkpoint.py" else set()
        assert not called_names(path) & UNSAFE_CALLS - allowed
        assert not UNSAFE_WORDS & set(words_of(path))


def test_the_one_reader_of_pt_files_reads_weights_only():
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "tokenizers_vq" / "pt_checkpoint.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    settings = [{keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for call in calls]
    assert [each["weights_only"] for each in settings] == ["True"]


def test_help_answers_without_torch_or_transformers():
    script = (
        "import sys; from typer.testing import CliRunner; from tok2img.cli import app; "
        "result = CliRunner().invoke(app, ['--help']); print(result.output); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))); sys.exit(result.exit_code)"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert "generate" in answer.stdout and answer.stdout.rstrip().endswith("[]")
