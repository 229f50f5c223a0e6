"""Scripts are not in a package: tests load them by their file, with their folder on the path as when they run."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TRAINING = Path(__file__).parents[2] / "training"
sys.path.insert(0, str(TRAINING / "experiments"))


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Load a script of `training/` by its path without the suffix."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(name).name, TRAINING / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
