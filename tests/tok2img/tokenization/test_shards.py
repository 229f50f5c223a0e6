import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tok2img.atomic_io import try_lock
from tok2img.tokenization import shards as token_shards
from tok2img.tokenization import token_dataset as tokenized
from tok2img.tokenization.token_dataset import load_tokens, parse_shard, save_tokens


@pytest.fixture(autouse=True)
def two_rows_a_shard(monkeypatch):
    monkeypatch.setattr(tokenized, "ROWS_PER_SHARD", 2)


@pytest.fixture
def whole(processor, rows, tmp_path) -> dict[str, bytes]:
    """Files that an undisturbed job writes."""
    save_tokens(rows, processor, tmp_path / "whole")
    return contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def done(monkeypatch) -> list[int]:
    """Numbers of the shards that are tokenized from now on."""
    numbers, plain = [], token_shards.tokenize_shard

    def tokenize_shard(job, number, bar=None):
        numbers.append(number)
        return plain(job, number, bar)

    monkeypatch.setattr(token_shards, "tokenize_shard", tokenize_shard)
    return numbers


@pytest.fixture
def stopped(processor, rows, tmp_path, monkeypatch) -> Path:
    """Folder of a job that was killed after its first shard."""
    plain = token_shards.tokenize_shard

    def tokenize_shard(job, number, bar=None):
        if number:
            raise KeyboardInterrupt
        return plain(job, number, bar)

    with monkeypatch.context() as patched:
        patched.setattr(token_shards, "tokenize_shard", tokenize_shard)
        with pytest.raises(KeyboardInterrupt):
            save_tokens(rows, processor, tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.mark.parametrize("num_proc", [1, 2])
def test_save_tokens_with_any_num_proc_writes_the_same_bytes(processor, rows, whole, tmp_path, num_proc):
    manifest = save_tokens(rows, processor, tmp_path / "again", num_proc=num_proc)
    assert contents(tmp_path / "again") == whole
    assert len(manifest["shards"]) == 3 and manifest["rows"] == 6 and manifest["skipped"] == []


def test_save_tokens_resumes_a_killed_job(processor, rows, whole, stopped, done):
    save_tokens(rows, processor, stopped)
    assert done == [1, 2] and contents(stopped) == whole
    assert sorted(path.name for path in stopped.parent.iterdir() if "tokens" in path.name) == ["tokens"]


def test_save_tokens_repeats_a_damaged_shard(processor, rows, whole, stopped, done):
    shard = stopped.parent / ".tokens.partial" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    save_tokens(rows, processor, stopped)
    assert done == [0, 1, 2] and contents(stopped) == whole


def test_save_tokens_keeps_a_finished_folder(processor, rows, whole, tmp_path, done):
    manifest = save_tokens(rows, processor, tmp_path / "whole")
    assert not done and manifest["rows"] == 6 and contents(tmp_path / "whole") == whole


@pytest.mark.parametrize("file", ["train-00001.parquet", "image_tokenizer/model.safetensors"])
def test_save_tokens_repeats_damaged_tokens(processor, rows, whole, tmp_path, done, file):
    (tmp_path / "whole" / file).write_bytes(whole[file][:-1] + b"?")
    save_tokens(rows, processor, tmp_path / "whole")
    assert done == [0, 1, 2] and contents(tmp_path / "whole") == whole


def test_save_tokens_does_not_reuse_shards_of_another_tokenizer(processor, rows, stopped, done):
    processor.image_tokenizer.quantizer.codebook.data[0] += 1
    save_tokens(rows, processor, stopped)
    assert done == [0, 1, 2]


def test_unreadable_rows_are_skipped_and_listed(processor, rows, tmp_path):
    spoiled = rows.select(range(5)).to_dict()
    spoiled["caption"][1], spoiled["image"][4] = None, {"bytes": b"no image", "path": None}
    data = Dataset.from_dict(spoiled)
    manifest = save_tokens(data, processor, tmp_path / "tokens")
    assert manifest["rows"] == 3 and [each["row"] for each in manifest["skipped"]] == [1, 4]
    assert "caption is not text" in manifest["skipped"][0]["reason"]
    tokens = load_tokens(tmp_path / "tokens")[0]
    assert tokens["image_codes"][:] == processor.encode_images(rows.select([0, 2, 3])["image"]).tolist()
    assert list(manifest["shards"]) == ["train-00000.parquet", "train-00001.parquet"]  # nothing was left of the third
    with pytest.raises(ValueError, match="row 1"):
        save_tokens(data, processor, tmp_path / "other", on_error="raise")


def test_data_with_only_unreadable_rows_is_an_error(processor, rows, tmp_path):
    data = Dataset.from_dict({"image": [{"bytes": b"none", "path": None}] * 3, "caption": ["a"] * 3})
    with pytest.raises(ValueError, match="none of the rows can be read; row 0: "):
        save_tokens(data, processor, tmp_path / "tokens")
    assert not list(tmp_path.glob("*tokens*")) + list(tmp_path.glob(".*tokens*"))


def test_several_processes_with_a_shard_each_write_the_same_folder(processor, rows, whole, tmp_path):
    manifests = [
        save_tokens(rows, processor, tmp_path / "tokens", shard_index=index, num_shards=3) for index in (2, 0, 1)
    ]
    assert manifests[:2] == [None, None] and manifests[2]["rows"] == 6
    assert contents(tmp_path / "tokens") == whole


def test_a_process_that_comes_after_the_last_shard_changes_nothing(processor, rows, whole, tmp_path):
    for index in (0, 2, 1, 3):
        manifest = save_tokens(rows, processor, tmp_path / "tokens", shard_index=index, num_shards=4)
    assert manifest["rows"] == 6 and contents(tmp_path / "tokens") == whole
    assert not (tmp_path / ".tokens.partial").exists()


def test_only_the_process_that_holds_the_lock_finalizes(processor, rows, whole, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens", shard_index=0, num_shards=2)
    with try_lock(tmp_path / ".tokens.partial") as is_ours:
        assert is_ours and save_tokens(rows, processor, tmp_path / "tokens", shard_index=1, num_shards=2) is None
    save_tokens(rows, processor, tmp_path / "tokens", shard_index=0, num_shards=2)
    assert contents(tmp_path / "tokens") == whole


def test_a_process_keeps_temporary_files_of_another(processor, rows, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens", shard_index=0, num_shards=3)
    theirs = tmp_path / ".tokens.partial" / ".train-00001.parquet.0123456789ab.tmp"
    theirs.touch()
    save_tokens(rows, processor, tmp_path / "tokens", shard_index=2, num_shards=3)
    assert theirs.exists()


def test_a_shard_of_another_job_is_refused(processor, rows, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens", shard_index=0, num_shards=2)
    with pytest.raises(ValueError, match="shards of another job"):
        save_tokens(rows.select(range(4)), processor, tmp_path / "tokens", shard_index=1, num_shards=2)


@pytest.mark.parametrize("text", ["", "3", "2/2", "-1/2", "a/b", "1/0"])
def test_parse_shard_refuses_what_is_not_i_of_n(text):
    with pytest.raises(ValueError, match="i/n"):
        parse_shard(text)
    assert parse_shard("1/4") == (1, 4)


def test_an_unknown_on_error_is_refused(processor, rows, tmp_path):
    with pytest.raises(ValueError, match="on_error must be one of skip, raise"):
        save_tokens(rows, processor, tmp_path / "tokens", on_error="ignore")


def test_a_killed_worker_is_replaced(processor, rows, whole, tmp_path, monkeypatch, caplog):
    plain, parent = token_shards.tokenize_shard, os.getpid()

    def tokenize_shard(job, number, bar=None):
        if number == 1 and not (tmp_path / "killed").exists():
            assert os.getpid() != parent
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(job, number, bar)

    monkeypatch.setattr(token_shards, "tokenize_shard", tokenize_shard)
    save_tokens(rows, processor, tmp_path / "tokens", num_proc=2)
    assert "A worker process was killed" in caplog.text and contents(tmp_path / "tokens") == whole


def test_workers_killed_three_times_in_a_row_end_the_job(processor, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "tokenize_shard", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="killed 3 times in a row, probably by too little memory for 2"):
        save_tokens(rows, processor, tmp_path / "tokens", num_proc=2)


def test_jobs_killed_at_random_lose_nothing():
    script = Path(__file__).parents[2] / "robustness" / "kill_tokenization.py"
    outcome = subprocess.run([sys.executable, script, "6"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert json.loads(outcome.stdout.splitlines()[-1])["kills"] >= 6
