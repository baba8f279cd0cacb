"""Files and folders that appear whole or not at all, whatever kills the process, and the hash that proves it."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Writes `parts` one after the other to `path`: a reader sees the old file or the new one.

    An OSError names `path`, not the temporary file beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, parts)
        os.replace(temporary, path)
    except OSError as error:  # of the file that was asked for, not of the one beside it
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # a folder that is not there or cannot be written has no temporary file either
            temporary.unlink()
    sync_folder(path.parent)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `out` that takes the place of `out` on success and is removed on failure.

    A folder cannot be swapped in one system call: a kill between the two renames leaves the old folder, whole, under
    its temporary name and nothing at `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        remove_leftovers(out.parent, re.escape(f".{out.name}"))
    shutil.rmtree(staging, ignore_errors=True)
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
    remove_leftovers(out.parent, re.escape(f".{out.name}"))


def remove_leftovers(folder: Path, stem: str) -> None:
    """Removes from `folder` what dead processes left: `<stem>.tmp-<pid>` and `<stem>.old-<pid>`, `stem` a regex.

    What bears our own id goes too: an earlier process had it, or we are done with it.
    """
    pattern = re.compile(rf"{stem}\.(?:tmp|old)-(\d+)")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists and is another user's
        return True
    return True


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
