"""Files that appear whole: what an error names, and what a killed process leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmfast import files


def test_an_error_names_the_file_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        files.write_atomic(tmp_path / "a.bin", b"a")
    assert failed.value.filename == str(tmp_path / "a.bin") and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError) as failed:
        files.write_atomic(tmp_path / "absent" / "a.bin", b"a")
    assert failed.value.filename == str(tmp_path / "absent" / "a.bin")


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, other = tmp_path / ".out.x.tmp-1", tmp_path / f".elsewhere.tmp-{dead.pid}"
    for path in (mine, other, tmp_path / f".out.x.tmp-{dead.pid}", tmp_path / f".out.x.old-{dead.pid}"):
        path.mkdir()
    with files.staged_folder(tmp_path / "out.x") as folder:
        (folder / "file").touch()
    assert set(tmp_path.iterdir()) == {tmp_path / "out.x", mine, other}
