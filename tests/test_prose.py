"""Docstrings, comments and the manual are in plain English: what can be checked by script."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tok2img", "tokenizers_vq", "training", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MAX_WORDS = 30
# A function's docstring says what it does: it opens with a verb.
NO_VERBS = {
    *(
        "what",
        "how",
        "whether",
        "as",
        "of",
        "where",
        "which",
        "those",
        "they",
        "says",
        "that",
        "whose",
        "who",
        "it",
        "its",
    ),
    *(
        "from",
        "between",
        "by",
        "to",
        "for",
        "in",
        "on",
        "at",
        "this",
        "these",
        "there",
        "when",
        "why",
        "so",
        "but",
        "and",
        "or",
    ),
}
# Words that a native reader stumbles over, and what to write instead.
ODD_WORDS = {
    r"\banew\b": "again, from scratch",
    r"\bso many\b": "n, up to n",
    r"\bbeside\b": "next to, compared with",
    r"\bgo(?:es|ing)? on\b": "resume, continue",
    r"\bwhoever\b": "the caller, the user",
    r"\bmend(?:ed)?\b": "fix",
    r"\bpictures?\b": "image",
    r"\bat once\b": "together, immediately",
    r"(?<!there )\b(?:is|are) no (?!longer\b|more\b)\w+": "is not a",
    r"\bas it stands\b": "unchanged",
}


def docstrings(path: Path) -> list[tuple[ast.AST, str]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [(node, text) for node in nodes if (text := ast.get_docstring(node))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_of_functions_open_with_a_verb(path):
    opened = [
        text.split()[0].strip("`\"'(,.:").lower()
        for node, text in docstrings(path)
        if isinstance(node, ast.FunctionDef)
    ]
    assert not NO_VERBS & set(opened)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sentences_of_docstrings_are_short(path):
    for _, text in docstrings(path):
        prose = re.split(r"(?:^|\n)\s*(?:Args|Attributes|Returns|Raises|Example)s?:", text)[0]
        # Formulas, drawings, tables and lists are indented or marked: they have no sentences.
        prose = re.sub(r"(?m)^(?: +|\||- ).*$", "", re.sub(r"`[^`]*`", "x", prose))
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", prose):
            assert len(sentence.split()) <= MAX_WORDS, sentence


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name_of)
def test_words_are_those_of_today(path):
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"`[^`]*`", "", text) if path.suffix == ".md" else "\n".join(each for _, each in docstrings(path))
    prose = " ".join(re.sub(r"`[^`]*`", "", prose).split())
    found = [
        (match.group(), better)
        for word, better in ODD_WORDS.items()
        for match in re.finditer(word, prose, re.IGNORECASE)
    ]
    assert not found
