"""Checkpoints survive a kill at any moment, damage is found and named, and a full disk harms nothing."""

import builtins
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from llmfast.errors import CheckpointError, InputError
from llmfast.weights import checkpoint, latest, load, save

TENSORS = {"model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)}, "rng": {"cpu": torch.get_rng_state()}}


def fail_on_skip(message: str) -> None:
    pytest.fail(f"unexpected: {message}")


def save_step(root: Path, step: int, **options: int) -> Path:
    return save(root, step, TENSORS, {"step": step}, **options)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    found = latest(tmp_path, fail_on_skip)
    assert (found.path, found.step, found.state) == (path, 7, {"step": 7})
    for name, tensors in TENSORS.items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_non_contiguous_tensors_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(load(save(tmp_path, 1, {"model": {"w": weight}}, {})).tensors("model")["w"], weight)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):  # 9 after 10: resumed from 2, so 10 is abandoned
        save_step(tmp_path, step)
        assert (tmp_path / f"step-{step}").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-9"]


def test_keep_counts(tmp_path: Path) -> None:
    for step in range(5):
        save_step(tmp_path, step, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3", "step-4"]
    with pytest.raises(InputError, match="keep is 1"):
        save_step(tmp_path, 9, keep=1)


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    (save_step(tmp_path, 3) / "model.safetensors").write_bytes(b"damaged")
    save_step(tmp_path, 3)
    assert latest(tmp_path, fail_on_skip).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage, file, fault",
    [
        (Path.unlink, "model.safetensors", "is missing"),
        (truncate, "model.safetensors", "bytes instead of"),
        (flip_bit, "model.safetensors", "sha256 differs"),
        (flip_bit, "rng.safetensors", "sha256 differs"),
        (flip_bit, "state.json", "sha256 differs"),
        (truncate, "manifest.json", "is damaged"),
        (lambda file: file.write_text("[" * 100_000), "manifest.json", "is damaged"),
        (Path.unlink, "manifest.json", "is missing"),
        (lambda file: file.write_bytes(b"{}"), "more.safetensors", "is not in the manifest"),
    ],
)
def test_damage_is_named_and_the_previous_one_used(tmp_path: Path, damage, file: str, fault: str) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2)
    damage(path / file)
    with pytest.raises(CheckpointError, match=f"{file}.*{fault}"):
        load(path)
    skipped: list[str] = []
    assert latest(tmp_path, skipped.append).step == 1
    assert len(skipped) == 1 and file in skipped[0] and fault in skipped[0]


def test_none_left(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        latest(tmp_path / "absent", fail_on_skip)
    truncate(save_step(tmp_path, 1) / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no undamaged checkpoint"):
        latest(tmp_path, lambda message: None)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "step-5")


def kill_at_call(number: int) -> None:
    """SIGKILL this process at call `number` of those that change the disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (builtins, "open"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("step", [3, 2])  # a new step, and one that is there
def test_killed_at_every_stage_of_a_save(tmp_path: Path, step: int) -> None:
    """After each kill there is an undamaged checkpoint, and the next save clears what is left."""
    killed = 0
    for number in range(100):
        root = tmp_path / str(number)
        save_step(root, 1)
        save_step(root, 2)
        child = os.fork()
        if child == 0:
            try:
                kill_at_call(number)
                save_step(root, step)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert latest(root, fail_on_skip).step in (1, 2, 3)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        save_step(root, 4)
        assert all(checkpoint._COMPLETE.fullmatch(p.name) for p in root.iterdir())
        assert latest(root, fail_on_skip).step == 4
    assert killed >= 14  # root and folder made, 5 files opened and synced, 2 folders synced, 1 or 2 renames, 1 removal


@pytest.mark.parametrize("file", ["model", "state", "manifest"])
@pytest.mark.parametrize("kind", ["error", "short"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, kind: str) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    real = open

    class Full:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self.inner.close()

        def write(self, data: bytes) -> int:
            self.inner.write(data[: len(data) // 2])
            if kind == "error":
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data) // 2

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

    def full(path, *args, **kwargs):
        inner = real(path, *args, **kwargs)
        return Full(inner) if Path(path).name.startswith(file) else inner

    monkeypatch.setattr(checkpoint, "open", full, raising=False)
    with pytest.raises(CheckpointError, match="step-3: not saved .*(No space left|was cut to)") as caught:
        save_step(tmp_path, 3)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert latest(tmp_path, fail_on_skip).step == 2


def test_only_dead_processes_are_cleaned_up(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    alive = tmp_path / f"step-1.tmp-{os.getppid()}"
    for folder in (tmp_path / f"step-1.tmp-{dead}", tmp_path / f"step-2.old-{dead}", alive):
        folder.mkdir()
    save_step(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, "step-3"]
