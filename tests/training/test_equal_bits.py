"""The comparison at equal bits trains every tokenizer and measures it."""

import pytest

from tok2img.shapes import shapes_dataset


def test_all_train_and_none_takes_more_bits_than_one_grid(script, tmp_path):
    shapes_dataset("train", 60).to_parquet(tmp_path / "train.parquet")
    shapes_dataset("validation", 20).to_parquet(tmp_path / "validation.parquet")
    reports = script("equal_bits").main(str(tmp_path), 2.0)
    assert len(reports) == 5 and all(report["steps"] >= 1 and 0 < report["mse"] < 1 for report in reports.values())
    assert max(report["bits_per_picture"] for report in reports.values()) == pytest.approx(576)
    assert min(report["bits_per_picture"] for report in reports.values()) > 550
