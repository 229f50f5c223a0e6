"""Each recipe file starts with the same fields and is read by its recipe class."""

from pathlib import Path

import pytest

from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.parsing import read_recipe

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "training" / "configs").glob("*.yaml"))
HEAD_FIELDS = ["Data", "Command", "Hardware", "Time", "Result"]
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def head(path: Path) -> list[str]:
    """Return the comment lines at the top of a file, without the number sign."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line[2:] for line in lines[:end]]


@each_config
def test_config_head_has_a_title_and_the_five_fields_in_order(path):
    title, blank, *lines = head(path)
    assert title and not blank
    # The text of a field is indented.
    starts = [line.partition(":")[0] for line in lines if not line.startswith("  ")]
    assert starts == HEAD_FIELDS
    texts = "\n".join(lines)
    for name, following in zip(HEAD_FIELDS, [*HEAD_FIELDS[1:], None], strict=True):
        text = texts.partition(f"{name}:")[2]
        text = text.partition(f"\n{following}:")[0] if following else text
        assert text.strip(), f"{name} is empty"


@each_config
def test_config_command_trains_with_the_file(path):
    command = "train-prior" if path.stem.endswith("_prior") else "train-tokenizer"
    assert f"{command} training/configs/{path.name}" in "\n".join(head(path))


@each_config
def test_config_is_read_by_its_recipe_class(path):
    recipe_class = PriorRecipe if path.stem.endswith("_prior") else TokenizerRecipe
    recipe = read_recipe(recipe_class, path)
    assert recipe.data and recipe.out and recipe.max_steps > 0


def test_config_heads_name_files_that_exist():
    words = {word.strip("().,;:") for path in CONFIGS for line in head(path) for word in line.split()}
    paths = {word for word in words if word.startswith(("training/", "docs/"))}
    assert paths and not [path for path in sorted(paths) if not (REPOSITORY / path).is_file()]
