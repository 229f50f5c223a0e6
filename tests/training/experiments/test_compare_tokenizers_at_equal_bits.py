"""The comparison at equal bits trains every tokenizer and measures it."""

from itertools import count
from types import SimpleNamespace

import cpu_time_budget
import pytest

from tok2img.data.shapes import shapes_dataset


@pytest.mark.parametrize(("bits", "num", "least"), [(120, 5, 119), (240, 6, 236)])
def test_all_tokenizers_train_within_the_bit_budget(script, tmp_path, monkeypatch, bits, num, least):
    shapes_dataset("train", 60).to_parquet(tmp_path / "train.parquet")
    shapes_dataset("validation", 20).to_parquet(tmp_path / "validation.parquet")
    equal_bits = script("experiments/compare_tokenizers_at_equal_bits")
    monkeypatch.setitem(equal_bits.SHARED, "hidden_channels", 16)
    monkeypatch.setattr(equal_bits, "VQDRAW", equal_bits.VQDRAW | {"hidden_channels": 8, "feature_channels": 8})
    monkeypatch.setattr(equal_bits, "ROWS_TO_START_FROM", 60)
    monkeypatch.setattr(
        cpu_time_budget, "time", SimpleNamespace(process_time=count().__next__)
    )  # a second passes at each look
    reports = equal_bits.main(str(tmp_path), 5, bits)
    assert len(reports) == num and all(report["steps"] == 4 and 0 < report["mse"] < 1 for report in reports.values())
    assert all(0 < report["mse_searched"] <= report["mse"] * 1.01 for report in reports.values())
    assert max(report["bits_per_image"] for report in reports.values()) == pytest.approx(bits, rel=1e-3)
    assert min(report["bits_per_image"] for report in reports.values()) > least
