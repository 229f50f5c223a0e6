import os
import shutil
import stat

import pytest

from tok2img import atomic_io as whole_files
from tok2img.atomic_io import (
    MANIFEST,
    check_manifest,
    commit_folder,
    files_in,
    remove_folder,
    remove_stale_temporaries,
    staged_update,
    temporary_name,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "model" / "inner" / "config").write_text("{}")
    write_manifest(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_what_its_manifest_says(folder):
    check_manifest(folder)


@pytest.mark.parametrize("position", [0, 100, 255])
def test_one_flipped_bit_is_seen(folder, position):
    content = bytearray((folder / "weights").read_bytes())
    content[position] ^= 1
    (folder / "weights").write_bytes(content)
    with pytest.raises(ValueError, match="weights is missing or damaged"):
        check_manifest(folder)


def test_a_missing_file_and_a_missing_manifest_are_seen(folder):
    (folder / "inner" / "config").unlink()
    with pytest.raises(ValueError, match="config is missing or damaged"):
        check_manifest(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="manifest.json is missing or damaged"):
        check_manifest(folder)


def test_a_folder_built_whole_replaces_the_one_before(folder):
    building = temporary_name(folder)
    building.mkdir()
    (building / "new").write_text("1")
    assert (folder / "weights").is_file()
    commit_folder(building, folder)
    assert [file.name for file in files_in(folder)] == ["new"] and len(list(folder.parent.iterdir())) == 1


def test_a_folder_that_is_not_finished_leaves_no_trace(folder):
    with pytest.raises(RuntimeError, match="no more"), staged_update(folder) as building:
        (building / "new").write_text("1")
        raise RuntimeError("no more")
    check_manifest(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_added_files_take_their_places_among_others(folder):
    with staged_update(folder) as building:
        (building / "inner").mkdir()
        (building / "inner" / "config").write_text("[]")
        (building / "card").write_text("hello")
    assert (folder / "inner" / "config").read_text() == "[]" and (folder / "card").read_text() == "hello"
    assert (folder / "weights").is_file() and not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_files_get_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with staged_update(tmp_path / "model") as building:
            (building / "weights").write_text("1")
            (building / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == 0o640


def test_what_a_killed_run_left_is_swept_away(folder):
    temporary_name(folder / "weights").write_text("half")
    temporary_name(folder / "inner").mkdir()
    remove_stale_temporaries(folder)
    assert {path.name for path in folder.iterdir()} == {"weights", "inner", MANIFEST}


def test_a_folder_may_be_removed_by_two_at_once(folder, monkeypatch):
    def after_the_other(path):
        shutil.rmtree(path)
        return temporary_name(path)

    monkeypatch.setattr(whole_files, "temporary_name", after_the_other)
    remove_folder(folder)
    assert not list(folder.parent.iterdir())


def test_removing_a_folder_that_is_not_there_is_nothing(tmp_path):
    remove_folder(tmp_path / "none")
    assert not list(tmp_path.iterdir())
