"""The script of the Python API does what it says."""

import importlib.util
from pathlib import Path

from PIL import Image

from tok2img.shapes import shapes_dataset

SCRIPT = Path(__file__).parents[2] / "training" / "from_python.py"


def test_the_script_goes_from_data_to_a_picture(tmp_path):
    shapes_dataset("train", 60).to_parquet(tmp_path / "shapes.parquet")
    spec = importlib.util.spec_from_file_location("from_python", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(str(tmp_path / "shapes.parquet"), tmp_path / "out", 2)
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.size == (32, 32)
