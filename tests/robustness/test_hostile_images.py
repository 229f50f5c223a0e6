"""Images that are awkward, hostile or damaged, in every form that they can be given in."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenizers_vq.images.loading import ImageError, load_image

CORPUS_SCRIPT = Path(__file__).parents[3] / "shared" / "hostile" / "make_bad_images.py"
MOST_BYTES, MOST_SECONDS = 50e6, 2.0
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
CODES = {code for literal in get_args(ImageError.__init__.__annotations__["code"]) for code in get_args(literal)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    if not CORPUS_SCRIPT.exists():
        pytest.skip(f"the corpus of hostile images is not here: {CORPUS_SCRIPT}")
    folder = tmp_path_factory.mktemp("bad_images")
    subprocess.run([sys.executable, CORPUS_SCRIPT, folder], check=True, capture_output=True)
    return folder, json.loads((folder / "manifest.json").read_text())


def row_of(path: Path | None, data: bytes | None) -> dict:
    """The row of a data set whose images are left undecoded."""
    cells = {"image": [{"bytes": data, "path": None if path is None else str(path)}]}
    return Dataset.from_dict(cells).cast_column("image", ImageFeature(decode=False))[0]["image"]


def opened(data: bytes) -> Image.Image | None:
    """What Pillow makes of a file's bytes, where it makes something of them."""
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


FORMS: dict[str, Callable[[Path, bytes], Any]] = {
    "path": lambda path, data: str(path),
    "bytes": lambda path, data: data,
    "PIL image": lambda path, data: opened(data),
    "data set row of bytes": lambda path, data: row_of(path, data),
    "data set row of a path": lambda path, data: row_of(path, None),
}


def complaint(source: Any, row: dict) -> str | None:
    """What is wrong with how a case of the corpus loads, if anything."""
    try:
        image = load_image(source)
    except ImageError as error:
        expected = row["outcome"] == "either" or error.code in row.get("code", [])
        return None if expected else f"{row['file']}: {error.code}: {error}"
    if row["outcome"] == "error":
        return f"{row['file']}: loaded, expected {row['code']}"
    probes = [(image.getpixel((x, y)), colour) for x, y, colour in row.get("probes", [])]
    near = all(np.abs(np.array(seen) - colour).max() <= row["tol"] for seen, colour in probes)
    right_size = list(image.size) == row.get("size", list(image.size))
    return None if image.mode == "RGB" and near and right_size else f"{row['file']}: {image} {probes}"


@pytest.mark.filterwarnings("ignore")  # Pillow's own, where it opens a file before we do
@pytest.mark.parametrize("form", FORMS)
def test_every_case_of_the_hostile_corpus_loads_as_documented(corpus: tuple[Path, list[dict]], form: str) -> None:
    folder, manifest = corpus
    complaints = []
    for row in manifest:
        path = folder / row["file"]
        readable = path.is_file() and os.access(path, os.R_OK)
        if readable or "path" in form:
            source = FORMS[form](path, path.read_bytes() if readable else b"")
            complaints.append(None if source is None else complaint(source, row))
    assert [each for each in complaints if each] == []
    assert len(complaints) > 50


def high_water_mark() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def test_no_case_of_the_corpus_takes_much_memory_or_time(corpus: tuple[Path, list[dict]]) -> None:
    folder, manifest = corpus
    took = {}
    for row in manifest:
        Path("/proc/self/clear_refs").write_text("5")
        before, start = high_water_mark(), time.process_time()
        complaint(folder / row["file"], row)
        took[row["file"]] = (high_water_mark() - before, time.process_time() - start)
    assert {name: cost for name, cost in took.items() if cost[0] > MOST_BYTES or cost[1] > MOST_SECONDS} == {}


def originals() -> dict[str, bytes]:
    """A small image of some detail in every format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    files = {}
    for image_format in FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, image_format)
        files[image_format] = buffer.getvalue()
    return files


ORIGINALS = originals()
places = st.floats(0, 1, exclude_max=True)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), places | st.floats(0, 0.1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), places, st.integers(1, 64)),
        st.tuples(st.just("end"), places, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, what in changes:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        else:
            data = data[:at] + (data[at + what :] if kind == "cut" else b"")
    return data


@given(st.sampled_from(FORMATS), edits)
def test_a_damaged_image_is_rgb_or_an_error_with_a_code(image_format: str, changes: list) -> None:
    try:
        image = load_image(damaged(ORIGINALS[image_format], changes))
    except ImageError as error:
        assert error.code in CODES and len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert image.mode == "RGB" and image.width * image.height <= 64_000_000


@given(st.binary(max_size=200))
def test_bytes_that_are_no_image_are_an_error_with_a_code(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(data)
    assert caught.value.code in CODES
