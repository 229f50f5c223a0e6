"""Every public name carries an example, and every example in a docstring runs as a doctest."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

PACKAGES = ("tokenizers_vq", "tok2img")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public_objects() -> list[tuple[str, object]]:
    """Return the functions and classes of both packages' `__all__`; a type alias or a constant has no docstring of its own."""
    named = [(f"{package}.{name}", getattr(importlib.import_module(package), name)) for package in PACKAGES
             for name in importlib.import_module(package).__all__]  # fmt: skip
    return [(name, each) for name, each in named if inspect.isclass(each) or inspect.isfunction(each)]


def modules() -> list[ModuleType]:
    found = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        names = [info.name for info in pkgutil.walk_packages(root.__path__, f"{package}.")]
        found += [root, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]
    return found


EXAMPLES = [test for module in modules() for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize(("name", "public"), public_objects(), ids=[name for name, _ in public_objects()])
def test_public_name_has_an_example(name, public):
    assert ">>> " in (public.__doc__ or ""), f"{name} has no example in its docstring"


@pytest.mark.parametrize("test", EXAMPLES, ids=[test.name for test in EXAMPLES])
def test_docstring_example_gives_what_it_shows(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=output.append)
    assert outcome.attempted and not outcome.failed, "".join(output)
