import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from tok2img.recipes.build_processor import MAX_TEXT_LENGTH, fit_text_tokenizer
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.tokenization.token_dataset import load_tokens, save_tokens


@pytest.fixture
def folder(processor, rows, tmp_path) -> Path:
    save_tokens(rows, processor, tmp_path / "tokens")
    return tmp_path / "tokens"


def test_tokens_survive_saving_and_loading(processor, folder, captions, pil_images):
    tokens, again = load_tokens(folder)
    assert tokens["image_codes"][:] == processor.encode_images(pil_images).tolist()
    assert tokens["text_ids"][:] == processor.encode_text(captions).tolist()
    assert again.layout == processor.layout


def test_saved_columns_keep_fixed_lengths_and_small_types(folder):
    features = load_tokens(folder)[0].features
    assert (features["text_ids"].length, features["text_ids"].feature.dtype) == (6, "uint16")
    assert (features["image_codes"].length, features["image_codes"].feature.dtype) == (4, "uint8")


def test_the_manifest_says_what_is_there(processor, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == 6 and manifest["fingerprint"] == processor.fingerprint()
    for name, checksum in manifest["shards"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum


def test_cut_captions_are_counted(processor, pil_images, tmp_path):
    data = Dataset.from_dict({"image": pil_images[:3], "caption": ["a", "red square " * 20, "dog " * 50]})
    assert save_tokens(data, processor, tmp_path / "tokens")["num_truncated_captions"] == 2


def test_rows_beyond_a_shard_go_into_another(processor, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("tok2img.tokenization.token_dataset.ROWS_PER_SHARD", 4)
    manifest = save_tokens(rows, processor, tmp_path / "tokens")
    assert list(manifest["shards"]) == ["train-00000.parquet", "train-00001.parquet"]
    assert len(load_tokens(tmp_path / "tokens")[0]) == 6


def test_of_processes_in_a_group_the_first_puts_together(processor, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("tok2img.tokenization.token_dataset.get_rank", lambda: 1)
    assert save_tokens(rows, processor, tmp_path / "tokens") is None and not (tmp_path / "tokens").exists()
    monkeypatch.setattr("tok2img.tokenization.token_dataset.get_rank", lambda: 0)
    assert save_tokens(rows, processor, tmp_path / "tokens")["rows"] == 6
    assert len(load_tokens(tmp_path / "tokens")[0]) == 6


def test_a_flipped_byte_is_refused_by_the_name_of_its_shard(folder):
    shard = folder / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.parquet is missing or damaged"):
        load_tokens(folder)


def test_fifty_of_fifty_flipped_bits_are_refused(folder):
    shard, chance = folder / "train-00000.parquet", random.Random(5)
    whole = shard.read_bytes()
    for _ in range(50):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00000\.parquet is missing or damaged"):
            load_tokens(folder)
    shard.write_bytes(whole)
    assert len(load_tokens(folder)[0]) == 6


def test_a_missing_shard_is_refused_by_its_name(folder):
    (folder / "train-00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"train-00000\.parquet is missing or damaged"):
        load_tokens(folder)


def test_another_image_tokenizer_in_the_folder_is_refused(folder, tiny_vqvae):
    tiny_vqvae.quantizer.codebook.data[0] += 1
    tiny_vqvae.save_pretrained(folder / "image_tokenizer")
    with pytest.raises(ValueError, match="not those that made the tokens"):
        load_tokens(folder)


def test_another_text_tokenizer_in_the_folder_is_refused(folder, text_tokenizer):
    other = SubwordTokenizer.train_bpe(["quite different words"], vocab_size=text_tokenizer.vocab_size)
    other.save_pretrained(folder / "text_tokenizer")
    with pytest.raises(ValueError, match="not those that made the tokens"):
        load_tokens(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"shards": 3, "fingerprint": ""}'])
def test_a_folder_without_a_whole_manifest_is_refused_by_name(folder, content):
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"{folder} holds no tokens"):
        load_tokens(folder)


def test_a_failure_leaves_nothing_behind(processor, pil_images, tmp_path):
    data = Dataset.from_dict({"image": pil_images[:2], "caption": ["a", None]})
    with pytest.raises(ValueError, match="row 1"):
        save_tokens(data, processor, tmp_path / "new" / "tokens", on_error="raise")
    assert not list(tmp_path.rglob("*tokens*"))


def test_a_failure_while_writing_leaves_the_old_tokens(processor, folder, rows, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(Dataset, "to_parquet", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_tokens(rows.select(range(4)), processor, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".tokens")]


def test_a_folder_in_use_for_something_else_is_left_alone(processor, rows, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and does not contain tokens"):
        save_tokens(rows, processor, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_in_use_is_refused_before_any_work(processor, rows, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(Tok2ImgProcessor, "encode_images", lambda *_, **__: pytest.fail("tokenized first"))
    with pytest.raises(ValueError, match="exists and does not contain tokens"):
        save_tokens(rows, processor, tmp_path)


def test_a_file_in_the_place_of_the_folder_is_left_alone(processor, rows, tmp_path):
    (tmp_path / "tokens").write_text("mine")
    with pytest.raises(ValueError, match="exists and does not contain tokens"):
        save_tokens(rows, processor, tmp_path / "tokens")
    assert (tmp_path / "tokens").read_text() == "mine"


def test_older_tokens_give_way_to_newer_ones(processor, folder, rows):
    save_tokens(rows.select(range(4)), processor, folder)
    assert len(load_tokens(folder)[0]) == 4


def test_the_text_length_is_that_of_the_longest_caption():
    tokenizer, length = fit_text_tokenizer(["a", "a red square"], vocab_size=256)
    assert length == max(map(len, tokenizer.encode(["a", "a red square"])))


def test_the_text_length_has_a_bound():
    assert fit_text_tokenizer(["x y " * 500], vocab_size=256)[1] == MAX_TEXT_LENGTH


def test_a_given_text_length_and_tokenizer_stand(text_tokenizer):
    assert fit_text_tokenizer(["a"], text_tokenizer=text_tokenizer, text_length=9) == (text_tokenizer, 9)


def test_captions_that_are_all_empty_still_have_a_position():
    assert fit_text_tokenizer(["", ""])[1] == 1


def test_loaded_codes_decode_to_the_images_of_the_tokenizer(processor, folder, pil_images):
    tokens, again = load_tokens(folder)
    codes = processor.encode_images(pil_images)
    shown = again.decode_images(codes.new_tensor(tokens["image_codes"][:]))
    for one, other in zip(shown, processor.decode_images(codes), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
