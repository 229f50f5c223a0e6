import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from tok2img.data.loading import held_out_split, load_captioned_images
from tokenizers_vq.images.loading import ImageError, load_image


def image(level: int = 0, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, image_format)
    return buffer.getvalue()


def write_parquet(path: Path, captions: Sequence[object], **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": image(i), "path": f"{i}.png"} for i in range(len(captions))]
    pq.write_table(pa.table({"image": images, "caption": captions} | columns), path)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_pairs(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(image())
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")
    return folder


def captions(source: Path, **options: object) -> list[str]:
    return list(load_captioned_images(str(source), **options)["caption"])  # type: ignore[arg-type]


def refusal(source: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_captioned_images(str(source), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _private_cache_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["a.parquet", "odd [name] *?.parquet"])
def test_a_parquet_file_gives_undecoded_images_and_captions(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / name, ["a", "b"], label=[3, 4], more=[0, 0])
    rows = load_captioned_images(str(path))
    assert rows.column_names == ["image", "caption", "label"]
    assert rows.features["image"] == datasets.Image(decode=False)
    assert [load_image(row).getpixel((0, 0)) for row in rows["image"]] == [(0, 0, 0), (1, 0, 0)]
    assert list(rows["label"]) == [3, 4]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "datasets"])
def test_images_may_be_stored_in_any_usual_way(tmp_path: Path, kind: str) -> None:
    path, data = tmp_path / "a.parquet", [image(7), image(8)]
    cells = {
        "binary": lambda: pa.array(data, pa.binary()),
        "large_binary": lambda: pa.array(data, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": each} for each in data]),
    }
    if kind == "datasets":
        rows = Dataset.from_dict({"jpg": [{"bytes": each} for each in data], "caption": ["a", "b"]})
        rows.cast_column("jpg", datasets.Image()).to_parquet(path)
    else:
        pq.write_table(pa.table({"jpg": cells[kind](), "caption": pa.array(["a", "b"], pa.large_string())}), path)
    rows = load_captioned_images(str(path))
    assert [load_image(row).getpixel((0, 0)) for row in rows["image"]] == [(7, 0, 0), (8, 0, 0)]
    assert rows.features["caption"] == datasets.Value("string")


def test_columns_are_named_or_the_only_ones_that_fit(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [image()], "alt": ["a cat"], "size": [3]}), tmp_path / "a.parquet")
    assert captions(tmp_path / "a.parquet") == ["a cat"]
    path = write_parquet(tmp_path / "b.parquet", ["a"], photo=[image(9)], alt=["c"])
    rows = load_captioned_images(str(path), image_column="photo", caption_column="alt")
    assert (load_image(rows[0]["image"]).getpixel((0, 0)), rows[0]["caption"]) == ((9, 0, 0), "c")


def test_captions_can_be_left_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [None])
    assert load_captioned_images(str(path), with_captions=False).column_names == ["image"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image())
    assert load_captioned_images(str(tmp_path / "images"), with_captions=False).column_names == ["image"]


def test_max_rows_keeps_the_first_and_checks_no_more(tmp_path: Path) -> None:
    assert captions(write_parquet(tmp_path / "a.parquet", ["a", "b", None]), max_samples=2) == ["a", "b"]
    assert captions(tmp_path / "a.parquet", max_samples=1) == ["a"]
    assert "max_samples" in refusal(tmp_path / "a.parquet", max_samples=0)


@pytest.mark.parametrize("place", ["{split}-00000-of-00001.parquet", "data/{split}_0.parquet", "{split}/0000.parquet"])
def test_a_parquet_folder_is_split_by_names(tmp_path: Path, place: str) -> None:
    for split in ("train", "test", "validation"):
        write_parquet(tmp_path / place.format(split=split), [split])
    assert [captions(tmp_path, split=split) for split in ("train", "test")] == [["train"], ["test"]]
    assert "only test, train, validation" in refusal(tmp_path, split="tset")


def test_a_parquet_folder_without_split_names_is_all_train(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", ["b"])
    write_parquet(tmp_path / "a.parquet", ["a"])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "empty.parquet")
    assert captions(tmp_path) == ["a", "b"]


def test_a_single_file_is_train_and_what_its_name_says(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet", ["a"])
    assert captions(path) == captions(path, split="test") == ["a"]
    assert "no split 'validation', only test, train" in refusal(path, split="validation")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["old"])
    assert captions(path) == ["old"]
    write_parquet(path, ["new"])
    assert captions(path) == ["new"]


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.enable_progress_bars()
    load_captioned_images(str(write_parquet(tmp_path / "a.parquet", ["a"])))
    cells = {"image": [image()], "text": pa.array(["a"], pa.large_string())}
    pq.write_table(pa.table(cells), tmp_path / "large.parquet")
    load_captioned_images(str(tmp_path / "large.parquet"))
    load_captioned_images(str(write_tar(tmp_path / "a.tar", {"a.png": image(), "a.txt": b"a"})))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    refusal(tmp_path / "cut.parquet")
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.png", "in/a.jpg"):
        (tmp_path / name).write_bytes(image())
    rows = [
        {"file_name": "b.png", "text": 'a "b", c', "label": "x"},
        {"file_name": "in/a.jpg", "text": "ä\nb", "label": "y"},
    ]
    if kind == "csv":
        lines = ["file_name,text,label", 'b.png,"a ""b"", c",x', 'in/a.jpg,"ä\nb",y']
        (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    loaded = load_captioned_images(str(tmp_path))
    assert list(loaded["caption"]) == [row["text"] for row in rows]
    assert list(loaded["label"]) == ["x", "y"]
    assert [os.path.relpath(cell["path"], tmp_path) for cell in loaded["image"]] == ["b.png", "in/a.jpg"]
    assert load_image(loaded[1]["image"]).size == (4, 4)


def test_metadata_above_split_folders_serves_each(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(image())
    (tmp_path / "metadata.csv").write_text("file_name,caption\ntrain/a.png,one\ntest/a.png,two\n")
    assert (captions(tmp_path), captions(tmp_path, split="test")) == (["one"], ["two"])
    assert "only test, train" in refusal(tmp_path, split="validation")


def test_a_folder_of_images_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "mnist" / "sub", "b")
    write_pairs(tmp_path / "mnist", "a")
    (tmp_path / "mnist" / "._a.png").write_bytes(b"what a Mac leaves")
    monkeypatch.chdir(tmp_path)
    rows = load_captioned_images("mnist")  # which is a name on the hub, too
    monkeypatch.chdir("/")
    assert list(rows["caption"]) == ["caption of a", "caption of b"]
    assert load_image(rows[0]["image"]).size == (4, 4)


def test_a_broken_image_is_named_when_it_is_used(tmp_path: Path) -> None:
    (write_pairs(tmp_path, "a") / "a.png").write_bytes(b"broken")
    rows = load_captioned_images(str(tmp_path))
    with pytest.raises(ImageError, match=r"a\.png"):
        load_image(rows[0]["image"])


@pytest.mark.parametrize(
    ("extension", "data", "caption_column"),
    [("txt", b"a cat", None), ("json", b'{"caption": "a cat", "n": 1}', None), ("json", b'{"alt": "a cat"}', "alt")],
)
def test_webdataset_tars(tmp_path: Path, extension: str, data: bytes, caption_column: str | None) -> None:
    write_tar(tmp_path / "test-0.tar", {"x/a.jpg": image(image_format="JPEG"), f"x/a.{extension}": data})
    rows = load_captioned_images(str(tmp_path), split="test", caption_column=caption_column)
    assert (rows.column_names, list(rows["caption"])) == (["image", "caption"], ["a cat"])
    assert load_image(rows[0]["image"]).size == (4, 4)


def test_webdataset_labels_are_kept(tmp_path: Path) -> None:
    members = {
        "a.png": image(),
        "a.json": b'{"caption": "a", "label": 3}',
        "b.png": image(),
        "b.json": b'{"caption": "b"}',
    }
    rows = load_captioned_images(str(write_tar(tmp_path / "a.tar", members)))
    assert rows.column_names == ["image", "caption", "label"] and list(rows["label"]) == [3, None]


def test_the_built_in_shapes() -> None:
    rows = load_captioned_images("shapes", split="validation", max_samples=3)
    assert (len(rows), rows.column_names) == (3, ["image", "caption"])
    assert load_image(rows[0]["image"]).mode == "RGB"


@pytest.mark.parametrize(
    "source", ["./absent", "/absent/file", "absent.parquet", "a/b/c", "absent/x.csv", "~/x", "no name"]
)
def test_an_absent_path_is_no_hub_name(source: str) -> None:
    assert refusal(source) == f"{source}: no such file or folder"


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_name_that_cannot_be_reached_is_named(name: str) -> None:
    assert refusal(name).startswith(f"{name}: no such file or folder, and not from the hub: ")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "page"])
def test_a_corrupt_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    write_parquet(tmp_path / "a.parquet", ["good"])
    data = write_parquet(tmp_path / "b.parquet", ["bad"]).read_bytes()
    damaged = {"empty": b"", "text": b"no", "cut": data[: len(data) // 2], "page": data[:20] + b"\xff" * 60 + data[80:]}
    (tmp_path / "b.parquet").write_bytes(damaged[damage])
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.parquet'}: cannot be read")


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_corrupt_tar_is_named(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": image(), "a.txt": b"a", "b.png": image(), "b.txt": b"b"})
    path.write_bytes(b"no tar" if damage == "text" else path.read_bytes()[:1600])
    assert refusal(path).startswith(f"{path}: cannot be read")


def test_no_rows_are_refused(tmp_path: Path) -> None:
    assert "no rows" in refusal(write_parquet(tmp_path / "a.parquet", []))
    assert "no rows" in refusal(write_tar(tmp_path / "a.tar", {}))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: no images")
    (tmp_path / "a.zip").touch()
    assert refusal(tmp_path / "a.zip") == f"{tmp_path / 'a.zip'}: expected a folder, a .parquet or a .tar file"


@pytest.mark.parametrize(
    ("option", "wanted", "nearest"), [("image_column", "imge", "image"), ("caption_column", "captions", "caption")]
)
def test_a_missing_column_is_named_beside_the_others(tmp_path: Path, option: str, wanted: str, nearest: str) -> None:
    message = refusal(write_parquet(tmp_path / "a.parquet", ["a"]), **{option: wanted})
    assert message.endswith(f"no column {wanted!r}, only 'image', 'caption'; did you mean {nearest!r}?")


def test_columns_that_cannot_be_guessed_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"first": [image()], "second": [image()], "x": ["a"], "y": ["b"]}), path)
    assert "no column 'image', only 'first', 'second', 'x', 'y'" in refusal(path)
    assert "no column 'caption'" in refusal(path, image_column="first")
    path = write_parquet(tmp_path / "b.parquet", ["a"], size=[3])
    assert "column 'size' holds Value('int64'), not images" in refusal(path, image_column="size")


@pytest.mark.parametrize(("cells", "row"), [(["a", "b", None], 2), ([3, 4], 0), ([None, None], 0), ([["a"], ["b"]], 0)])
def test_a_caption_that_is_not_text_is_named_by_its_row(tmp_path: Path, cells: list[object], row: int) -> None:
    message = refusal(write_parquet(tmp_path / "a.parquet", cells))
    assert f"row {row}: its caption is {cells[row]}, not text" in message


def test_an_image_without_caption_is_named(tmp_path: Path) -> None:
    (write_pairs(tmp_path, "a", "b") / "b.txt").unlink()
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.png'}: no caption")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.png'}: the .txt next to it cannot be read")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a\n")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.png'}: no caption")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,caption\na.png\n", "metadata.csv, line 2: 'caption' is None, not text"),
        (
            "metadata.csv",
            "file,caption\na.png,a\n",
            "metadata.csv, line 2: no column 'file_name', only 'file', 'caption'",
        ),
        (
            "metadata.csv",
            "file_name,title\na.png,a\n",
            "metadata.csv, line 2: no column 'caption', only 'file_name', 'title'",
        ),
        ("metadata.csv", "file_name,caption\nb.png,a\n", "metadata.csv, line 2: no such file: "),
        ("metadata.csv", "file_name,caption\n", "no caption, "),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "metadata.jsonl, line 1: 'text' is 3, not text"),
        ("metadata.jsonl", '{"file_name": "a.png", "te', "metadata.jsonl: cannot be read: "),
        ("metadata.jsonl", "[1]", "metadata.jsonl: cannot be read: "),
    ],
)
def test_bad_metadata_is_named_by_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / name).write_text(text)
    assert message in refusal(tmp_path)


def test_an_example_of_a_tar_without_caption_is_refused(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": image() if kind == "png" else b"a" for i in range(7) for kind in ("png", "txt")}
    del members["6.txt"]
    path = write_tar(tmp_path / "a.tar", members)
    assert refusal(path) == f"{path}: row 6: its caption is None, not text"


def test_held_out_rows_are_a_fixed_part_of_all() -> None:
    rows = Dataset.from_dict({"caption": [str(i) for i in range(100)]})
    kept, held_out = held_out_split(rows, share=0.1, max_samples=50, seed=0)
    assert (len(kept), len(held_out)) == (90, 10)
    assert sorted([*kept["caption"], *held_out["caption"]]) == sorted(rows["caption"])
    assert list(held_out["caption"]) == list(held_out_split(rows, share=0.1, max_samples=50, seed=0)[1]["caption"])
    assert list(held_out["caption"]) != list(held_out_split(rows, share=0.1, max_samples=50, seed=1)[1]["caption"])


@pytest.mark.parametrize(
    ("num_rows", "share", "max_samples", "expected"), [(2, 0.01, 9, 1), (2, 0.99, 9, 1), (100, 0.5, 3, 3)]
)
def test_both_parts_of_a_split_have_rows(num_rows: int, share: float, max_samples: int, expected: int) -> None:
    rows = Dataset.from_dict({"caption": np.arange(num_rows)})
    kept, held_out = held_out_split(rows, share=share, max_samples=max_samples, seed=0)
    assert (len(held_out), len(kept)) == (expected, num_rows - expected)
    with pytest.raises(ValueError, match="cannot hold out"):
        held_out_split(rows, share=round(share), max_samples=max_samples, seed=0)
