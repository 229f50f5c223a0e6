"""Fill the tables of `docs/cli.md` while mkdocs builds it: options from the command line itself, keys from the recipes.

A line `[[options COMMAND]]` becomes the usage and the table of a command's options, and `[[keys RECIPE]]` the table of a recipe's own keys.
So the page cannot differ from `tok2img COMMAND --help`.
"""

import inspect
import re
import shlex
from dataclasses import MISSING, fields
from typing import Any

import typer

from tok2img.cli.app import app
from tok2img.recipes import config

MARKER = re.compile(r"^\[\[(options|keys) ([\w-]+)\]\]$", re.MULTILINE)
# "    name, other: text", and further lines of the text, which are indented deeper.
ATTRIBUTE = re.compile(r"^    ([a-z]\w*(?:, [a-z]\w*)*): (.*(?:\n     .*)*)", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of `cli.md`; mkdocs calls this for every page."""
    if page.file.src_uri != "cli.md":
        return markdown
    tables = {"options": options_table, "keys": keys_table}
    return MARKER.sub(lambda match: tables[match[1]](match[2]), markdown)


def commands() -> dict[str, Any]:
    """Return the commands of `tok2img` by name."""
    root: Any = typer.main.get_command(app)
    return dict(root.commands)


def options_table(name: str) -> str:
    """Return a command's usage line and a table of its arguments and options."""
    command = commands()[name]
    words, rows = ["tok2img", name], []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        if is_argument:
            placeholder = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
            words.append(placeholder if parameter.required else f"[{placeholder}]")
        elif parameter.required:
            words += [parameter.opts[0], parameter.name.upper()]
        shown = placeholder if is_argument else parameter.opts[0]
        rows.append((shown, default_of(parameter), parameter.help or ""))
    takes_recipe = command.context_settings.get("ignore_unknown_options", False)
    usage = " ".join([*words, *(["[RECIPE.yaml]", "[--key value ...]"] if takes_recipe else []), "[options]"])
    table = markdown_table(("option", "default", "meaning"), rows)
    help_text = command.help.replace("[", "\\[")  # brackets would read as a link
    return f"```text\n{usage}\n```\n\n{help_text}\n\n{table}"


def default_of(parameter: Any) -> str:
    """Return what an option is without being given, as one types it."""
    if parameter.required:
        return "required"
    default = parameter.default
    if getattr(parameter, "is_flag", False):
        return "off"
    return "" if default in (None, "") else shlex.quote(str(default))


def keys_table(name: str) -> str:
    """Return a table of the keys that a recipe class adds to its base class or whose default it changes."""
    recipe = getattr(config, name)
    inherited = (
        {each.name: each.default for each in fields(recipe.__mro__[1])} if recipe.__mro__[1] is not object else {}
    )
    meanings = attribute_docs(config.RunSettings) | attribute_docs(recipe)
    rows = [
        (each.name, "{}" if each.default is MISSING else repr(each.default), meanings.get(each.name, ""))
        for each in fields(recipe)
        if each.name not in inherited or inherited[each.name] != each.default
    ]
    return markdown_table(("key", "default", "meaning"), rows)


def attribute_docs(recipe: type[Any]) -> dict[str, str]:
    """Return what the `Attributes:` section of a class says of each attribute, on one line."""
    section = inspect.getdoc(recipe).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    found = {}
    for names, text in ATTRIBUTE.findall(section):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; the first two columns are code."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, default, meaning in rows:
        shown = f"`{default}`" if default and default not in ("required", "off") else default
        lines.append(f"| `{name}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
