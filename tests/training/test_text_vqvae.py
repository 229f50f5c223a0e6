"""The comparison of text tokenizers runs, and both of its models learn."""

from datasets import Dataset


def test_both_models_learn_and_their_curves_rise(script, tmp_path):
    texts = [f"a {colour} {shape}" for colour in ("red", "blue", "pink") for shape in ("disc", "ring", "box")] * 30
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"text": texts[:9]}).to_parquet(tmp_path / "validation.parquet")
    curves = script("text_vqvae").main(str(tmp_path), 4.0)
    for name in ("vqdraw", "vqvae"):
        assert curves[f"{name}_steps"] > 2
        assert len(curves[name]) == 4 and curves[name][-1] > 0.5
