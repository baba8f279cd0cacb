"""Crash-safe checkpoints: a `step-N/` folder is complete or absent, whatever kills the process while it is written."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..files import file_sha256, remove_leftovers, sync_folder

MANIFEST = "manifest.json"
STATE = "state.json"
_COMPLETE = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified against their sha256."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU."""
        file = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); use another checkpoint") from None


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `root/step-<step>/` and return it: a `<name>.safetensors` for each entry of `tensors`, and `state` as JSON.

    Files are written and fsynced in a temporary folder, the manifest last, and the folder is renamed: a reader sees all
    of it or nothing. The newest `keep` (at least 2) checkpoints up to `step` stay; later ones, which a resume from an
    earlier step has abandoned, and the leavings of dead processes go. Raises CheckpointError, with the checkpoints
    already there intact, if the disk is full or cannot be written.
    """
    if keep < 2:
        raise InputError(f"keep is {keep}; at least 2 checkpoints must stay, so that one may be damaged")
    final, temporary = root / f"step-{step}", root / f"step-{step}.tmp-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root, r"step-\d+")
        try:
            _write_files(temporary, tensors, state)
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        steps = saved_steps(root)
        kept = [n for n in steps if n <= step][-keep:]
        for n in steps:
            if n not in kept:
                shutil.rmtree(root / f"step-{n}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{final}: not saved ({reason}); free space there or give another folder") from error
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises CheckpointError naming the file and what is wrong with it."""
    match = _COMPLETE.fullmatch(path.name)
    if match is None or not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; give a folder named step-<number>")
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            _verify(path / name, expected["bytes"], expected["sha256"])
        unlisted = {STATE, *(file.name for file in path.glob("*.safetensors"))} - files.keys()
        if unlisted:
            raise CheckpointError(f"{path / min(unlisted)}: is not in the manifest; use another checkpoint")
        state = json.loads((path / STATE).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: is missing; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path / MANIFEST}: is damaged; use another checkpoint") from None
    return Checkpoint(path, int(match[1]), state)


def latest(root: Path, on_skip: Callable[[str], None]) -> Checkpoint:
    """The newest undamaged checkpoint under `root`.

    For every damaged one that is passed over, `on_skip` gets a line that names its fault. Raises CheckpointError if
    none is left.
    """
    steps = saved_steps(root)
    for step in reversed(steps):
        try:
            return load(root / f"step-{step}")
        except CheckpointError as error:
            on_skip(f"passed over a damaged checkpoint: {error}")
    raise CheckpointError(f"{root}: holds no {'undamaged ' if steps else ''}checkpoint; start a new run")


def saved_steps(root: Path) -> list[int]:
    """The steps of the checkpoints under `root`, damaged or not, ascending; none where there is no such folder."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _COMPLETE.fullmatch(name)))


def _write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    folder.mkdir()
    files = {}
    for name, group in tensors.items():
        data = safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in group.items()})
        files[f"{name}.safetensors"] = _write(folder / f"{name}.safetensors", data)
    files[STATE] = _write(folder / STATE, json.dumps(state, indent=1).encode())
    _write(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())
    sync_folder(folder)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync a new file; returns its row of the manifest."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != len(data):
        raise OSError(f"{path.name} was cut to {path.stat().st_size} of {len(data)} bytes")
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _publish(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`. A folder of that name, from a step now done again, is moved aside first."""
    replaced = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _verify(path: Path, size: int, sha256: str) -> None:
    actual = path.stat().st_size
    if actual != size:
        raise CheckpointError(f"{path}: has {actual} bytes instead of {size}; use another checkpoint")
    if file_sha256(path) != sha256:
        raise CheckpointError(f"{path}: its contents changed (sha256 differs); use another checkpoint")
