"""The comparison of text tokenizers runs, and both of its models learn."""

from itertools import count
from types import SimpleNamespace

import cpu_time_budget
from datasets import Dataset


def test_both_models_learn_and_their_curves_rise(script, tmp_path, monkeypatch):
    texts = [f"a {colour} {shape}" for colour in ("red", "blue", "pink") for shape in ("disc", "ring", "box")] * 30
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"text": texts[:9]}).to_parquet(tmp_path / "validation.parquet")
    monkeypatch.setattr(
        cpu_time_budget, "time", SimpleNamespace(process_time=count().__next__)
    )  # a second passes at each look
    curves = script("experiments/compare_text_tokenizers").main(str(tmp_path), 30)
    for name in ("vqdraw", "vqvae"):
        assert curves[f"{name}_steps"] == 29
        assert len(curves[name]) == 4 and curves[name][-1] > 0.5
