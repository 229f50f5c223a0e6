import json
import math

import datasets
import pytest
from datasets import Dataset

from tok2img.evaluation.reports import load_eval_split, save_report


def write(folder, *splits, image=b"content"):
    for split in splits:
        columns = {"image": [image], "caption": [split]}
        Dataset.from_dict(columns).to_parquet(str(folder / f"{split}-0.parquet"))


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "validation", "test")])
def test_load_eval_split_prefers_test_over_validation(tmp_path, splits):
    write(tmp_path, *splits)
    assert load_eval_split(str(tmp_path))["caption"][:] == [splits[-1]]


def test_load_eval_split_with_damaged_test_split_raises(tmp_path):
    write(tmp_path, "train", "test")
    with pytest.raises(ValueError, match="no column 'titel'"):
        load_eval_split(str(tmp_path), caption_column="titel")
    write(tmp_path, "validation")
    (tmp_path / "test-0.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="test-0.parquet: cannot be read"):
        load_eval_split(str(tmp_path))


def test_data_of_the_hub_without_a_test_split_has_its_validation_rows(monkeypatch):
    def load(name: str, split: str) -> Dataset:
        if split == "test":
            raise ValueError("Unknown split \"test\". Should be one of ['train', 'validation'].")
        return Dataset.from_dict({"image": [b"content"], "caption": [split]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_eval_split("somebody/images")["caption"][:] == ["validation"]


def test_save_report_with_non_finite_numbers_writes_null(tmp_path):
    text = save_report({"psnr": math.inf, "stages": [{"mse": math.nan}, 0.5]}, tmp_path / "report.json")
    assert json.loads(text) == {"psnr": None, "stages": [{"mse": None}, 0.5]}
    assert (tmp_path / "report.json").read_text() == text + "\n"
