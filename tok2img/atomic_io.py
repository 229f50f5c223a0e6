"""Atomic writes of files and folders.

Everything is written under a temporary name in the same folder, flushed with fsync, and renamed. Files get the umask's
mode, because safetensors makes them readable by their owner alone.
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
TEMPORARY = ".tmp"  # suffix of unfinished files and folders


def write_atomically(path: str | PathLike[str], content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
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
    """Flush a finished folder to disk and rename it to `target`, replacing an older one."""
    fsync_tree(building)
    remove_folder(target)
    building.rename(target)
    fsync_path(target.parent)


@contextmanager
def staged_update(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved into `folder` one by one when the block succeeds."""
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
    """Return a new hidden name in the same folder."""
    return path.with_name(f".{path.name.lstrip('.')}.{uuid4().hex[:12]}{TEMPORARY}")


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Try to take an exclusive lock on a folder; yields True if it was acquired.

    The lock is released when the block or the process ends. Windows has no such locks; there it always succeeds.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        # Another process may have renamed the folder before the lock was acquired.
        yield is_locked(descriptor) and folder.is_dir()
    finally:
        os.close(descriptor)


def is_locked(descriptor: int) -> bool:
    """Lock an open file or folder without waiting; False if another process holds the lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically, by a rename first; does nothing if it is missing."""
    leaving = temporary_name(folder)
    with suppress(FileNotFoundError):
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def remove_stale_temporaries(folder: str | Path, name: str = "*") -> None:
    """Remove temporary files and folders that a killed process left, of one name or of all."""
    for left in Path(folder).glob(f".{name}{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)


def fsync_tree(folder: Path) -> None:
    """Set all files to the umask's mode, and flush them and their folders to disk."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files_in(folder):
        file.chmod(0o666 & ~umask)
        fsync_path(file)
    for each in {file.parent for file in files_in(folder)} | {folder}:
        fsync_path(each)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    """Return all files of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a folder in `manifest.json`."""
    files = {str(file.relative_to(folder)): [file.stat().st_size, sha256_of(file)] for file in files_in(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Check a folder against its manifest; ValueError names the first missing or damaged file."""
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
    """Return the sha256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
