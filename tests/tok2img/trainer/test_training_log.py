import json
import math
import os

import pytest

from tok2img.trainer.training_log import LOG_FILE, load_log, save_log


def test_a_log_is_read_back_and_leaves_no_temporary_file(tmp_path):
    log = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.25}]
    save_log(log, tmp_path / "new")
    assert load_log(tmp_path / "new") == log and os.listdir(tmp_path / "new") == [LOG_FILE]


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
    save_log([{"step": 1, "loss": math.nan, "mse": math.inf, "grad_norm": -math.inf}], tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (entry,) = json.loads((tmp_path / LOG_FILE).read_text(), parse_constant=refuse)
    assert entry == {"step": 1, "loss": None, "mse": None, "grad_norm": None}


def test_every_entry_has_a_line(tmp_path):
    save_log([{"step": step} for step in range(5)], tmp_path)
    assert len((tmp_path / LOG_FILE).read_text().splitlines()) == 5 + 2


def test_a_folder_without_a_log_has_no_entries(tmp_path):
    assert load_log(tmp_path) == load_log("someone/a-model-of-the-hub") == []


@pytest.mark.parametrize("content", ["[{", '{"step": 1}', "[1]", "\udcff"])
def test_a_file_that_is_no_log_is_refused_by_name(tmp_path, content):
    (tmp_path / LOG_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=LOG_FILE):
        load_log(tmp_path)
