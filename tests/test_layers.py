"""The rules that keep the code readable and safe, checked on its source."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder, or a file beside the folders, imports only from floors that stand above it in this table, and from itself.
FLOORS = {
    "tokenizers_vq": [
        ["validation", "distributed", "modules", "model_with_loss"],
        ["loading", "losses", "images"],
        ["base"],
        ["auto", "text_base", "quantization"],
        ["vqvae", "vqdraw", "pretrained"],
    ],
    "tok2img": [
        ["atomic_io", "device"],
        ["data"],
        ["tokenization"],
        ["prior", "visualization"],
        ["generation", "trainer"],
        ["pipelines"],
        ["evaluation", "serving"],
        ["recipes"],
        ["cli"],
    ],
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


SOURCES = [path for package in (*FLOORS, "training") for path in sources(package)]
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_WORDS = {"extractall", "trust_remote_code", "allow_pickle", "unsafe_load", "full_load"}


def is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_of(tree: ast.AST, *, for_typing: bool) -> Iterator[ast.AST]:
    """Yield all nodes of a file; without those under `if TYPE_CHECKING:` unless `for_typing`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if for_typing or not is_for_typing(node):
            yield node
            waiting += ast.iter_child_nodes(node)


def imported_modules(path: Path, *, for_typing: bool = True) -> set[str]:
    """Return full names of every module and every `from` name that a file imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in nodes_of(ast.parse(path.read_text()), for_typing=for_typing):
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


def unit_of(module: str) -> str:
    """Return what has a floor: a folder of a package, or a file beside the folders."""
    return "/".join(module.split(".")[:2])


def module_imports() -> dict[str, set[str]]:
    """Return the imports between modules of both packages, without those for type checking alone and those of `__init__`."""
    files = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for package in FLOORS for path in sources(package)
    }
    imports: dict[str, set[str]] = {}
    for path, name in files.items():
        if path.name != "__init__.py":
            imports[name] = (imported_modules(path, for_typing=False) & set(files.values())) - {name}
    return imports


def test_every_folder_and_file_has_a_floor():
    modules = [name for name in module_imports() if not name.endswith("__main__")]
    found = {unit_of(name) for name in modules}
    assert found == {f"{package}/{unit}" for package, floors in FLOORS.items() for floor in floors for unit in floor}


def test_imports_point_to_lower_floors():
    floor_of = {
        f"{package}/{unit}": floor
        for package, floors in FLOORS.items()
        for floor, units in enumerate(floors)
        for unit in units
    }
    for name, targets in module_imports().items():
        for target in targets:
            here, there = unit_of(name), unit_of(target)
            if here == there or name.endswith("__main__"):
                continue
            package, other = here.split("/")[0], there.split("/")[0]
            assert (package, other) != ("tokenizers_vq", "tok2img"), f"{name} imports {target}"
            assert package != other or floor_of[there] < floor_of[here], f"{name} imports {target}"


def test_no_modules_import_each_other_in_a_circle():
    imports = module_imports()
    while leaves := {name for name, targets in imports.items() if not targets & imports.keys()}:
        imports = {name: targets for name, targets in imports.items() if name not in leaves}
    assert not imports


@pytest.mark.parametrize("package", FLOORS)
def test_folders_are_one_level_deep_and_hold_at_most_12_files(package):
    folders = [path for path in (ROOT / package).rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert {path.parent for path in folders} == {ROOT / package}
    assert max(len(list(path.glob("[!_]*.py"))) for path in folders) <= 12


def test_packages_do_not_import_training():
    for package in FLOORS:
        for path in sources(package):
            assert "training" not in {name.split(".")[0] for name in imported_modules(path)}, path.name


def test_the_vqdraw_loop_imports_no_refiner_and_no_modality():
    ours = {name for name in module_imports()["tokenizers_vq.vqdraw.core"] if name.startswith("tokenizers_vq")}
    assert ours <= {
        "tokenizers_vq.vqdraw.options",
        "tokenizers_vq.quantization.nearest_neighbors",
        "tokenizers_vq.quantization.kmeans",
        "tokenizers_vq.distributed",
    }


def test_generation_imports_neither_processor_nor_tokenizers():
    for name, targets in module_imports().items():
        if name.startswith("tok2img.generation."):
            assert not {target for target in targets if target.startswith(("tok2img.tokenization.p", "tokenizers_vq"))}


def test_tokenizing_imports_nothing_that_trains():
    imports, reached, waiting = module_imports(), set(), {"tok2img.tokenization.token_dataset"}
    while waiting:
        reached |= waiting
        waiting = {target for name in waiting for target in imports.get(name, ())} - reached
    assert not {name for name in reached if name.startswith(("tok2img.prior", "tok2img.trainer", "tok2img.recipes"))}


@pytest.mark.parametrize(("package", "name"), public_names("tokenizers_vq") + public_names("tok2img"))
def test_every_public_name_has_a_docstring(package, name):
    documentation = getattr(importlib.import_module(package), name).__doc__
    assert documentation and not documentation.startswith(f"{name}("), "a dataclass without one gets its signature"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
class TestEveryFile:
    def test_is_at_most_400_lines(self, path):
        assert len(path.read_text().splitlines()) <= 400

    def test_is_named_after_its_idea(self, path):
        assert path.stem not in {"utils", "helpers", "common", "util", "misc"}

    def test_runs_nothing_that_it_reads(self, path):
        modules = {name.split(".")[0] for name in imported_modules(path)}
        assert not modules & {"pickle", "dill", "cloudpickle", "joblib"}
        allowed = {"torch.load"} if path.name == "pt_to_safetensors.py" else set()
        assert not called_names(path) & UNSAFE_CALLS - allowed
        assert not UNSAFE_WORDS & set(words_of(path))


def test_the_one_reader_of_pt_files_reads_weights_only():
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "tokenizers_vq" / "vqdraw" / "pt_to_safetensors.py").read_text()))
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
