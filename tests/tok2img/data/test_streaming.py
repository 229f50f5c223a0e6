import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tok2img.data.loading import load_captioned_images
from tok2img.data.streaming import StreamedRows, stream_captioned_images
from tok2img.recipes.build_processor import fit_text_tokenizer
from tok2img.tokenization import token_dataset as tokenized
from tok2img.tokenization.token_dataset import load_tokens, save_tokens
from tokenizers_vq import load_image
from tokenizers_vq.images.loading import ImageError

WORDS = ["a red square", "a blue disc", "naïve 猫", "", "a dog on a mat"]


def encoded(row: int, image_format: str = "PNG") -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, image_format)
    return buffer.getvalue()


def write_parquet(path: Path, rows: range, *, row_group_size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(row), "path": f"{row}.png"} for row in rows]
    table = pa.table(
        {"image": images, "caption": [WORDS[row % 5] for row in rows], "more": [list(range(9))] * len(rows)}
    )
    pq.write_table(table, path, row_group_size=row_group_size)


def write_tar(path: Path, rows: range, *, as_json: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row in rows:
            text = WORDS[row % 5]
            about = json.dumps({"caption": text, "width": 8}).encode() if as_json else text.encode()
            for name, content in {"jpg": encoded(row, "JPEG"), "json" if as_json else "txt": about}.items():
                member = tarfile.TarInfo(f"some/{row:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module", params=["parquet", "tar of texts", "tar of json"])
def folder(request, tmp_path_factory) -> Path:
    """Forty captioned images in three files of a kind."""
    folder = tmp_path_factory.mktemp("packed")
    for number, rows in enumerate((range(0, 17), range(17, 18), range(18, 40))):
        if request.param == "parquet":
            write_parquet(folder / f"train-{number}.parquet", rows, row_group_size=5)
        else:
            write_tar(folder / f"train-{number}.tar", rows, as_json=request.param.endswith("json"))
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> list[tuple[bytes, str]]:
    """Its rows as the readers of `datasets` read them."""
    files = sorted(map(str, folder.iterdir()))
    kind = "parquet" if files[0].endswith(".parquet") else "webdataset"
    cache = str(tmp_path_factory.mktemp("cache"))
    rows = datasets.load_dataset(kind, data_files={"train": files}, split="train", cache_dir=cache)
    image, caption = ("image", "caption") if kind == "parquet" else ("jpg", "txt")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    return [
        (load_image(row[image]).tobytes(), row["json"]["caption"] if "json" in row else row[caption]) for row in rows
    ]


def test_loaded_rows_are_those_that_datasets_reads_in_any_order(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_captioned_images(str(folder))
    order = np.random.default_rng(0).permutation(40)
    shuffled = pickle.loads(pickle.dumps(rows.select(order)))  # noqa: S301 - as workers of a DataLoader get it
    assert rows.column_names == ["image", "caption"] and rows.features["image"] == datasets.Image(decode=False)
    assert [(load_image(row["image"]).tobytes(), row["caption"]) for row in shuffled] == [whole[row] for row in order]
    assert [load_image(image).tobytes() for image in rows["image"][:]] == [image for image, _ in whole]
    assert [load_image(image).tobytes() for image in rows[3:5]["image"]] == [image for image, _ in whole[3:5]]
    is_copied = (tmp_path / "cache").exists()
    assert is_copied == (next(folder.iterdir()).suffix == ".parquet"), "tars are read in place"


@given(first=st.integers(0, 39), num=st.integers(1, 40), size=st.integers(1, 50))
def test_batches_of_any_rows_equal_those_of_datasets(folder, whole, first, num, size):
    rows = range(first, min(first + num, 40))
    streamed = stream_captioned_images(str(folder))
    batches = list(streamed.batches(rows, size))
    assert [len(batch["image"]) for batch in batches][:-1] == [size] * (len(batches) - 1)
    found = [
        (load_image(image).tobytes(), text) for batch in batches for image, text in zip(*batch.values(), strict=True)
    ]
    assert found == whole[rows.start : rows.stop]


def test_captions_can_be_iterated_twice(folder, whole):
    rows = stream_captioned_images(str(folder), max_samples=25)
    assert len(rows) == 25 and list(rows.captions) == list(rows.captions) == [caption for _, caption in whole[:25]]


def test_streamed_and_loaded_data_give_the_same_token_files(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "ROWS_PER_SHARD", 7)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_tokens(stream_captioned_images(str(folder)), processor, tmp_path / "streamed", num_proc=2)
    assert not (tmp_path / "cache").exists(), "nothing is copied"
    save_tokens(load_captioned_images(str(folder)), processor, tmp_path / "copied")
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.parquet")}
        for name in ("copied", "streamed")
    ]
    assert shards[0] == shards[1] and len(shards[0]) == 6


def test_fingerprint_changes_with_files_and_max_samples(folder, processor, tmp_path):
    def job(**settings):
        return stream_captioned_images(str(folder), **settings).fingerprint

    assert job() == job() != job(max_samples=39)
    before = job()
    file = next(path for path in folder.iterdir() if path.stem == "train-1")
    kept = file.read_bytes()
    file.write_bytes(kept)  # another time
    assert job() != before


def test_fingerprint_of_an_image_folder_changes_with_its_images(tmp_path, pil_images):
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(pil_images):
        image.save(tmp_path / "folder" / f"{number}.png")
        (tmp_path / "folder" / f"{number}.txt").write_text("a caption")

    def job():
        return stream_captioned_images(str(tmp_path / "folder")).fingerprint

    before = job()
    assert job() == before
    pil_images[0].save(tmp_path / "folder" / "1.png")
    assert job() != before


def test_text_tokenizer_is_the_same_from_streamed_captions(folder, whole, monkeypatch):
    captions = [caption for _, caption in whole]
    monkeypatch.setattr(tokenized, "ROWS_PER_SHARD", 3)
    tokenizer, length = fit_text_tokenizer(stream_captioned_images(str(folder)).captions, vocab_size=280)
    other, same = fit_text_tokenizer(captions, vocab_size=280)
    assert tokenizer.state() == other.state() and length == same == max(tokenizer.lengths(captions, max_length=64))


def test_streaming_parquet_holds_few_pages_in_memory(tmp_path):
    generator = np.random.default_rng(0)
    images = [generator.bytes(20_000) for _ in range(2_000)]
    table = pa.table({"image": images, "caption": ["a"] * 2_000})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2_000, write_batch_size=16)
    del images, table
    streamed, most, before = stream_captioned_images(str(tmp_path / "train.parquet")), 0, pa.total_allocated_bytes()
    for batch in streamed.batches(range(100, 2_000), 64):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(batch["image"][0]) == 20_000
    assert 0 < most < 8e6, "of 40 MB in one row group"


class TestMissingAndDamaged:
    @pytest.fixture
    def tar(self, tmp_path) -> Path:
        """Six rows: one without an image, one without a caption, three whose JSON is malformed."""
        parts = {"0.png": encoded(0), "0.json": b'{"caption": "a"}', "1.json": b'{"caption": "b"}', "2.png": encoded(2)}
        parts |= {"2.json": b"{}", "3.png": encoded(3), "3.json": b"[", "._4.png": b"", "README": b"no row"}
        parts |= {"5.png": encoded(5), "5.json": b"[" * 200_000, "6.png": encoded(6), "6.json": b"\xff"}
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            for name, content in parts.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return tmp_path / "train.tar"

    def test_a_row_without_an_image_or_a_caption_is_skipped_and_listed(self, tar, processor, tmp_path):
        manifest = save_tokens(stream_captioned_images(str(tar)), processor, tmp_path / "tokens")
        assert manifest["rows"] == 1 and [each["row"] for each in manifest["skipped"]] == [1, 2, 3, 4, 5]
        assert len(load_tokens(tmp_path / "tokens")[0]) == 1

    def test_on_error_raise_names_the_row(self, tar, processor, tmp_path):
        with pytest.raises(ValueError, match="row 1: "):
            save_tokens(stream_captioned_images(str(tar)), processor, tmp_path / "tokens", on_error="raise")

    def test_training_reads_the_same_rows_and_names_the_first_without_a_caption(self, tar):
        rows = load_captioned_images(str(tar), with_captions=False)
        assert len(rows) == len(stream_captioned_images(str(tar))) == 6
        assert load_image(rows[2]["image"]).tobytes() == load_image(encoded(2)).tobytes()
        with pytest.raises(ImageError, match="must have 'bytes' or 'path'"):
            load_image(rows[1]["image"])
        with pytest.raises(ValueError, match="row 2: its caption is None, not text"):
            load_captioned_images(str(tar))

    def test_a_negative_max_samples_is_refused(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", range(3), row_group_size=5)
        with pytest.raises(ValueError, match="max_samples must be at least 1, got -5"):
            stream_captioned_images(str(tmp_path), max_samples=-5)

    def test_a_folder_without_rows_is_refused(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", range(0), row_group_size=5)
        with pytest.raises(ValueError, match=r"train\.parquet: no rows"):
            stream_captioned_images(str(tmp_path))

    def test_a_file_with_other_columns_than_the_first_is_named(self, tmp_path):
        write_parquet(tmp_path / "train-0.parquet", range(3), row_group_size=5)
        pq.write_table(pa.table({"image": [encoded(0)], "title": ["a"]}), tmp_path / "train-1.parquet")
        with pytest.raises(ValueError, match=r"train-1\.parquet: no column 'caption', only 'image', 'title'"):
            stream_captioned_images(str(tmp_path))

    def test_a_file_that_is_damaged_after_its_first_rows_is_named(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", range(40), row_group_size=5)
        rows = stream_captioned_images(str(tmp_path / "train.parquet"))
        content = bytearray((tmp_path / "train.parquet").read_bytes())
        content[2_000:6_000] = bytes(4_000)
        (tmp_path / "train.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.parquet: cannot be read: "):
            list(rows.batches(range(40), 8))

    @pytest.mark.parametrize("num_bytes", [300, 700, 9_300, 9_700, 10_000])
    def test_a_truncated_tar_is_named(self, tmp_path, num_bytes):
        write_tar(tmp_path / "train.tar", range(20), as_json=True)
        (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:num_bytes])
        with pytest.raises(ValueError, match=r"train\.tar: cannot be read as tar"):
            stream_captioned_images(str(tmp_path))


def test_a_rewritten_tar_is_indexed_again(tmp_path):
    write_tar(tmp_path / "train.tar", range(3), as_json=False)
    before = list(stream_captioned_images(str(tmp_path / "train.tar")).captions)
    write_tar(tmp_path / "train.tar", range(3, 7), as_json=True)
    os.utime(tmp_path / "train.tar", ns=(0, 1))
    after = list(stream_captioned_images(str(tmp_path / "train.tar")).captions)
    assert before == [WORDS[row] for row in range(3)] and after == [WORDS[row % 5] for row in range(3, 7)]


def test_a_tar_whose_first_row_has_no_caption_is_refused_by_its_name(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in {"0.png": encoded(0), "0.json": b"{"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"train\.tar: no column 'caption', only 'png'"):
        stream_captioned_images(str(tmp_path))


def test_a_folder_of_images_is_read_as_before(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded(ord(name)))
        (tmp_path / f"{name}.txt").write_text(name)
    rows = stream_captioned_images(str(tmp_path))
    assert not isinstance(rows, StreamedRows) and list(rows.captions) == ["a", "b"]
    (batch,) = rows.batches(range(2), 5)
    assert [load_image(image).size for image in batch["image"]] == [(8, 8)] * 2 and isinstance(rows.dataset, Dataset)
