"""Ray Data gives the codes that we give ourselves."""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from tok2img import Tok2ImgProcessor, TokenizeBatch, shapes_dataset
from tok2img.tokenization.text_tokenizer import SubwordTokenizer

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_codes_of_ray_are_those_of_tokenize(script, tiny_vqvae, tmp_path):
    rows = shapes_dataset("validation", 6)
    text = SubwordTokenizer.train_bpe(rows["caption"], vocab_size=300)
    processor = Tok2ImgProcessor.build(tiny_vqvae.eval(), text, text_length=8)
    processor.save_pretrained(tmp_path / "model")
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    # Workers import the script by its name.
    paths = [str(Path(__file__).parents[3]), str(Path(__file__).parents[3] / "training" / "examples"), *sys.path]
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": ":".join(paths)}})
    try:
        script("examples/tokenize_with_ray").main(
            str(tmp_path / "rows.parquet"), str(tmp_path / "model"), str(tmp_path / "tokens"), 1
        )
    finally:
        ray.shutdown()
    ours = TokenizeBatch(processor)({"image": rows["image"][:], "caption": rows["caption"][:]})
    theirs = pyarrow.parquet.read_table(tmp_path / "tokens").to_pydict()
    assert theirs.keys() == ours.keys()
    for name, column in theirs.items():
        np.testing.assert_array_equal(sorted(column), sorted(ours[name].tolist()))
