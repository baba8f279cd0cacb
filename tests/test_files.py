"""Files that appear whole: what an error names, and what a killed process leaves; and JSON that is refused."""

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


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xfe{", "is not readable JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not readable JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "is not readable JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        (b'{"a": [{"b": 1, "\\u0062": 2}]}', "'b' is given twice"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word) as raised:
        files.parse_json(data)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_json_is_read_from_regular_files_of_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to such files among them, but neither pipes nor devices, which may never end."""
    data = b'{"a": 1}'
    (tmp_path / "file").write_bytes(data)
    for name, target in (("link", tmp_path / "file"), ("device", "/dev/zero"), ("dangling", tmp_path / "absent")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", len(data))
    assert files.read_json(tmp_path / "file") == files.read_json(tmp_path / "link") == {"a": 1}
    for name in ("device", "pipe", "."):
        with pytest.raises(ValueError, match="is no regular file"):
            files.read_json(tmp_path / name)
    for name in ("dangling", "absent"):
        with pytest.raises(FileNotFoundError):
            files.read_json(tmp_path / name)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", len(data) - 1)
    with pytest.raises(ValueError, match="has more than 7 bytes"):
        files.read_json(tmp_path / "file")
