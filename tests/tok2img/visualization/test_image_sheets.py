import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tok2img.visualization.image_sheets import (
    make_captioned_sheet,
    make_image_grid,
    make_reconstruction_sheet,
    make_stage_sheet,
    save_image,
)


def image(color: str = "red", size: int = 28) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def count(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == color).all(axis=2).sum())


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_grid_shows_every_image_as_it_is() -> None:
    grid = make_image_grid([image(), image("blue"), image()], columns=2)
    assert grid.size == (2 * 28 + 3 * 2, 2 * 28 + 3 * 2)
    assert (count(grid, RED), count(grid, BLUE)) == (2 * 28**2, 28**2)


def test_gray_images_stay_gray() -> None:
    grid = make_image_grid([Image.new("L", (3, 3), 100)], columns=1)
    assert count(grid, (100, 100, 100)) == 9


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    sheet = make_captioned_sheet([image()], ["red"])
    assert count(sheet, RED) == (4 * 28) ** 2


def test_large_images_keep_their_size() -> None:
    assert count(make_captioned_sheet([image(size=200)], ["red"]), RED) == 200**2


def test_a_longer_caption_takes_more_lines_but_no_more_width() -> None:
    short, long = (make_captioned_sheet([image()], [text]) for text in ("one", "a caption with quite a few more words"))
    assert long.width == short.width and long.height > short.height


def test_a_word_wider_than_its_image_is_broken() -> None:
    narrow = make_captioned_sheet([image()], ["x"])
    assert make_captioned_sheet([image()], ["Donaudampfschifffahrtsgesellschaft"]).size[0] == narrow.size[0]


def test_a_very_long_caption_is_cut_with_dots() -> None:
    five, many = (make_captioned_sheet([image()], ["word " * count]) for count in (200, 2000))
    assert five.size == many.size


def test_captioned_sheet_with_empty_caption_works() -> None:
    assert count(make_captioned_sheet([image()], [""]), RED) == 112**2


def test_originals_stand_above_reconstructions() -> None:
    sheet = np.asarray(make_reconstruction_sheet([image()] * 3, [image("blue")] * 3, columns=2))
    row_is = {color: (sheet == color).all(axis=2).any(axis=1).nonzero()[0] for color in (RED, BLUE)}
    assert row_is[RED][0] < row_is[BLUE][0] < row_is[RED][-1] < row_is[BLUE][-1]


def test_stages_stand_side_by_side() -> None:
    sheet = np.asarray(make_stage_sheet([[image(), image("blue")]] * 3, num_codes=[1, 10]))
    column_is = {color: (sheet == color).all(axis=2).any(axis=0).nonzero()[0] for color in (RED, BLUE)}
    assert column_is[RED][-1] < column_is[BLUE][0]


def test_rows_of_unequal_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="headers"):
        make_stage_sheet([[image()], [image(), image()]])


def test_images_and_captions_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        make_captioned_sheet([image(), image()], ["red"])


@pytest.mark.parametrize(
    "draw", [lambda: make_image_grid([], 3), lambda: make_stage_sheet([]), lambda: make_captioned_sheet([], [])]
)
def test_no_images_are_refused(draw: Callable[[], Image.Image]) -> None:
    with pytest.raises(ValueError, match="no image"):
        draw()


def test_a_saved_image_is_read_back_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    save_image(image(), tmp_path / "new" / "red.png")
    save_image(image("blue"), tmp_path / "new" / "red.png")
    assert os.listdir(tmp_path / "new") == ["red.png"]
    assert count(Image.open(tmp_path / "new" / "red.png"), BLUE) == 28**2


def test_a_saved_image_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    save_image(image(), tmp_path / "red.webp")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "red.webp").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_keeps_the_old_image_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(image(), tmp_path / "red.png")

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_image(image("blue"), tmp_path / "red.png")
    assert os.listdir(tmp_path) == ["red.png"]
    assert count(Image.open(tmp_path / "red.png"), RED) == 28**2


@pytest.mark.parametrize("name", ["sheet.xyz", "sheet"])
def test_an_unknown_suffix_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        save_image(image(), tmp_path / name)
