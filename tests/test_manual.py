"""The manual builds without a warning or the network, and its page of commands agrees with the command line."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tok2img.cli.app import app
from tok2img.recipes import config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_has_a_section_for_every_command(reference):
    assert {f"[[options {name}]]" for name in reference.commands()} <= set(PAGE.splitlines())


def test_options_tables_hold_every_option_of_help(reference):
    for name in reference.commands():
        result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
        listed = re.sub(r"Keys:.*", "", result.output, flags=re.DOTALL)
        options = set(re.findall(r"--[a-z][a-z-]+", listed)) - {"--help", "--key", "--model.codebook_size"}
        table = reference.options_table(name)
        missing = {option for option in options if option not in table and not option.startswith("--no-")}
        assert not missing, name


@pytest.mark.parametrize("name", ["RunSettings", "TokenizerRecipe", "PriorRecipe", "RankerRecipe"])
def test_keys_tables_hold_every_key(reference, name):
    keys = {each.name for each in fields(getattr(config, name))}
    tables = reference.keys_table(name) + reference.keys_table("RunSettings")
    assert keys <= set(re.findall(r"^\| `(\w+)`", tables, re.MULTILINE))


def test_keys_table_shows_a_changed_default_and_no_inherited_key(reference):
    rows = reference.keys_table("RankerRecipe").splitlines()
    assert any(row.startswith("| `batch_size` | `128` |") for row in rows)
    assert not any(row.startswith("| `learning_rate` |") for row in rows)


def test_attribute_docs_reads_names_that_share_a_line_and_wrapped_text(reference):
    class Recipe:
        """Keys.

        Attributes:
            first, second: Of both,
                on two lines.
            third: Alone.
        """

    both = "Of both, on two lines."
    assert reference.attribute_docs(Recipe) == {"first": both, "second": both, "third": "Alone."}


def test_manual_builds_without_warnings_or_remote_files(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]* src="?https?:|<link[^>]* rel="?(?:stylesheet|preload|icon)"? [^>]*href="?https?:'
    )
    assert pages and not [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))]
