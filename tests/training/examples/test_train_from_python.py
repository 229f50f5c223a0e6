"""The script of the Python API does what it says."""

from PIL import Image

from tok2img.data.shapes import shapes_dataset


def test_the_script_goes_from_data_to_an_image(script, tmp_path):
    shapes_dataset("train", 60).to_parquet(tmp_path / "shapes.parquet")
    script("examples/train_from_python").main(str(tmp_path / "shapes.parquet"), tmp_path / "out", 2)
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert image.size == (32, 32)
