"""Files and folders that appear whole or not at all, whatever kills the process, and the hash that proves it."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Writes `parts` one after the other to `path`: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `out` that takes the place of `out` on success and is removed on failure.

    A folder cannot be swapped in one system call: a kill between the two renames leaves the old folder, whole, under
    its temporary name and nothing at `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.old-{os.getpid()}")
    for leftover in (staging, replaced):  # of a killed process that had our id
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        sync_folder(staging)
        if out.exists():
            out.rename(replaced)
        try:
            staging.rename(out)
        except BaseException:
            if replaced.exists():
                replaced.rename(out)
            raise
        sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hash of the file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
