"""Files and folders that are there whole or not at all.

Everything is written under a temporary name in the same folder, brought to the disk, and renamed. Files get the mode that the umask
gives: safetensors leaves them readable by their owner alone.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from uuid import uuid4

if sys.platform != "win32":
    import fcntl
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"  # how the names of unfinished files and folders end


def write_atomically(path: str | PathLike[str], content: bytes) -> None:
    """Write a file under a temporary name beside it and rename it, so that readers see the old or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit_folder(building: Path, target: Path) -> None:
    """Give a folder that is built the name it was built for, in place of the one before, when all of it is on the disk."""
    fsync_tree(building)
    remove_folder(target)
    building.rename(target)
    fsync_path(target.parent)


@contextmanager
def staged_update(folder: str | Path) -> Iterator[Path]:
    """A folder to build in, whose files take their places in `folder` one by one when the block ends well; other files there stay."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    building = temporary_name(folder / "new")
    building.mkdir()
    try:
        yield building
        fsync_tree(building)
        for file in files_in(building):
            place = folder / file.relative_to(building)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        fsync_path(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A new name beside a path, hidden."""
    return path.with_name(f".{path.name.lstrip('.')}.{uuid4().hex[:12]}{TEMPORARY}")


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether a folder is there and nobody else has claimed it; until the block ends, or this process, nobody else can.

    On Windows, which has no such locks, the claim is taken for granted.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        # It may have gone to its place while this process came to the lock.
        yield is_locked(descriptor) and folder.is_dir()
    finally:
        os.close(descriptor)


def is_locked(descriptor: int) -> bool:
    """Lock an open file or folder, if nobody else has."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there and no other process removes it, so that nobody ever sees half of it."""
    leaving = temporary_name(folder)
    with suppress(FileNotFoundError):
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def remove_stale_temporaries(folder: str | Path, name: str = "*") -> None:
    """Clear away what was left unfinished in a folder, of one name or of all, when it was killed."""
    for left in Path(folder).glob(f".{name}{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)


def fsync_tree(folder: Path) -> None:
    """Give files the mode of the umask, and bring them and their folders to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files_in(folder):
        file.chmod(0o666 & ~umask)
        fsync_path(file)
    for each in {file.parent for file in files_in(folder)} | {folder}:
        fsync_path(each)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and those below, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a folder in `manifest.json`."""
    files = {str(file.relative_to(folder)): [file.stat().st_size, sha256_of(file)] for file in files_in(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """ValueError for a folder that is not what its manifest says, with the first file that is missing or damaged."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        recorded = {name: (int(size), str(checksum)) for name, (size, checksum) in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {MANIFEST} is missing or damaged") from error
    for name, (size, checksum) in recorded.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != checksum:
            raise ValueError(f"{folder}: {name} is missing or damaged")


def sha256_of(file: Path) -> str:
    """Checksum of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
