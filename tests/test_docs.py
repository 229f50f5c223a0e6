"""The manual's Python runs, and its commands, keys, paths and links exist."""

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from tok2img.cli.app import app
from tok2img.generation.captioning import CAPTION_KEY
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe, RankerRecipe, TokenizerRecipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
RECIPES = {"train-tokenizer": TokenizerRecipe, "train-prior": PriorRecipe, "train-ranker": RankerRecipe}
# Blocks that name one of these only have to compile: an engine that is not installed, a server, or the hub.
NOT_RUN = ("vllm", "sglang", "gradio_client", "push_to_hub")
LAYERS = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
FLOORS = next(
    ast.literal_eval(node.value)
    for node in LAYERS.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
)
# Folders whose files the manual names; other paths in backticks are examples, such as `runs/digits`.
OUR_FOLDERS = ("tok2img", "tokenizers_vq", "training", "tests", "benchmarks", "docs")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and content of each fenced block; of one inside an admonition without its indentation."""
    for indent, language, content in re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        yield language, re.sub(f"^{indent}", "", content, flags=re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def python_blocks(path: Path) -> list[str]:
    return [content for language, content in fenced_blocks(path.read_text(encoding="utf-8")) if language == "python"]


def commands_in(path: Path) -> Iterator[list[str]]:
    """Yield the words after `tok2img` of each command, in fenced blocks and in backticks."""
    text = path.read_text(encoding="utf-8")
    blocks = [content for language, content in fenced_blocks(text) if language in ("", "bash", "sh", "console")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline_code(text)
    for line in lines:
        found = re.match(r"\s*(?:\$ )?(?:torchrun .* -m |python -m )?tok2img (.*)", line)
        if found and not found[1].startswith("COMMAND"):
            yield shlex.split(found[1], comments=True)


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return dict(root.commands)


def complaint_about(words: list[str]) -> str | None:
    """Return what is wrong with a command of the manual: its name, an option or a recipe's key."""
    name, *rest = words
    if name not in commands():
        return None if name.startswith("-") else f"no command {name}"
    options = {option for parameter in commands()[name].params for option in parameter.opts} | {"--help", "--key"}
    keys = {each.name for each in fields(RECIPES[name])} if name in RECIPES else set()
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if not option.startswith("--") or option in options:
            continue
        key = option.removeprefix("--").replace("-", "_")
        if key not in keys and not (key.startswith("model.") and "model" in keys):
            return f"tok2img {name} has no {option}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=name_of)
class TestEveryPage:
    def test_commands_name_existing_commands_options_and_keys(self, path: Path):
        complaints = [complaint_about(words) for words in commands_in(path) if words]
        assert [each for each in complaints if each] == []

    def test_paths_in_backticks_exist(self, path: Path):
        named = [word for code in inline_code(path.read_text(encoding="utf-8")) for word in code.split()]
        paths = [word for word in named if re.fullmatch(rf"({'|'.join(OUR_FOLDERS)})/[\w./*-]*", word)]
        assert [each for each in paths if not list(ROOT.glob(each.rstrip("/")))] == []

    def test_recipes_in_commands_exist(self, path: Path):
        recipes = [word for words in commands_in(path) for word in words if word.startswith("training/")]
        assert [each for each in recipes if not (ROOT / each).is_file()] == []

    def test_links_point_to_files_and_headings(self, path: Path):
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
            file, _, anchor = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            if anchor and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", prose(linked.read_text(encoding="utf-8")), re.MULTILINE)
                slugs = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in headings]
                assert anchor in slugs, target

    def test_paragraphs_have_at_most_five_lines(self, path: Path):
        paragraphs = prose(path.read_text(encoding="utf-8")).split("\n\n")
        text = [
            each.strip()
            for each in paragraphs
            if not each.lstrip().startswith(("|", "-", "*", "#", "!", ":::", "    "))
        ]
        assert [each for each in text if len(each.splitlines()) > 5 and not re.match(r"\d+\. ", each)] == []

    def test_python_compiles(self, path: Path):
        for block in python_blocks(path):
            ast.parse(block)


def test_commands_of_the_manual_are_found():
    """The tests above would pass on pages in which they find nothing."""
    assert len([words for path in PAGES for words in commands_in(path)]) > 30
    assert (
        complaint_about(["generate", "a dog", "--model", "DIR", "--best-off", "4"])
        == "tok2img generate has no --best-off"
    )
    assert complaint_about(["train-prior", "--depht", "3"]) == "tok2img train-prior has no --depht"
    assert complaint_about(["tokenise", "DATA"]) == "no command tokenise"


@pytest.fixture
def workspace(pipeline, processor, rows, pil_images, tmp_path, monkeypatch) -> Path:
    """A folder with what the blocks name: models, images and a data set."""
    pipeline.save_pretrained(tmp_path / "runs" / "demo" / "model")
    image_to_text = build_prior(processor.layout, depth=1)
    setattr(image_to_text.generation_config, CAPTION_KEY, True)
    TextToImagePipeline(image_to_text, processor).save_pretrained(tmp_path / "runs" / "captioner" / "model")
    for name in ("photo.png", "scan.png"):
        pil_images[0].save(tmp_path / name)
    shutil.copy(tmp_path / "rows.parquet", tmp_path / "data.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of other libraries, which a reader would see too
@pytest.mark.parametrize("path", [path for path in PAGES if python_blocks(path)], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {}
    for block in python_blocks(path):
        if not any(word in block for word in NOT_RUN):
            exec(compile(block, name_of(path), "exec"), names)  # noqa: S102


@pytest.mark.parametrize("package", FLOORS)
def test_floors_of_the_design_page_are_those_that_are_checked(package: str):
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = page.partition(f"### {package}\n")[2].partition("\n#")[0]
    floors: dict[str, list[str]] = {}
    for number, cell in re.findall(r"^\| (\d+) \| ([^|]*) \|", section, re.MULTILINE):
        floors.setdefault(number, []).extend(re.findall(r"`(\w+)`", cell))
    assert list(floors.values()) == FLOORS[package]
