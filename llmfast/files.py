"""Files and folders that appear whole or not at all, whatever kills the process, the hash that proves it, and JSON that
a stranger wrote."""

import hashlib
import json
import os
import re
import reprlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_JSON_BYTES = 64 * 2**20


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


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of the file `path`, and yield True; or False, where we are not to `wait` for another that holds it.

    No lock where the system has none.
    """
    if fcntl is None:
        yield True
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


def file_sha256(path: Path) -> str:
    """Hash of the file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError as of `parse_json`; FileNotFoundError where there is nothing.

    Only a regular file is opened: a pipe would keep us waiting, and a device may have no end.
    """
    if not path.is_file():
        if not path.exists():
            raise FileNotFoundError(2, "No such file", str(path))
        raise ValueError("is no regular file; give a file, or a link to one")
    with open(path, "rb") as file:
        data = file.read(min(path.stat().st_size, MAX_JSON_BYTES) + 1)  # memory is taken for as many
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has more than {MAX_JSON_BYTES} bytes; it is no configuration")
    return parse_json(data)


def parse_json(data: bytes) -> dict[str, Any]:
    """The object that is written there. ValueError with what is wrong, to be put behind a file's name.

    A name that occurs twice in an object is refused: other readers may take the other value.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object; fetch the file again")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{reprlib.repr(name)} is given twice")
    return values


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
