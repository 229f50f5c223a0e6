"""Registers our task with transformers when somebody asks transformers for pipelines, and loads nothing before.

`import tok2img` must stay light, since every `tok2img --help` does it; transformers' pipelines bring torch along. So the registration waits
until they are imported, whichever of the two packages came first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

WATCHED = "transformers.pipelines"


class RegisterOnImport(MetaPathFinder):
    """Finds transformers' pipelines as Python does, and registers our task when they have loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec, its loader followed by the registration; None for every other module."""
        if fullname != WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenRegister(spec.loader)
        return spec


class ThenRegister(Loader):
    """A loader that does what another does, and then registers."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other does; then our task is among the pipelines."""
        self.loader.exec_module(module)
        register()


def register() -> None:
    """Import our task, which needs transformers' pipelines, and register it."""
    from .transformers_task import register as register_task

    register_task()


def register_when_wanted() -> None:
    """Register now if transformers' pipelines are there already, else when they are imported; once, however often this is called."""
    if WATCHED in sys.modules:
        register()
    elif not any(isinstance(finder, RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterOnImport())
