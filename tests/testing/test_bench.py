"""The benchmark harness: what it writes, and that a wrong backend gets no time."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmfast.errors import InputError
from llmfast.ops import registry
from llmfast.ops.registry import BACKENDS, Backend
from llmfast.testing import bench, timing

LABEL = "1024x768"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times mean nothing here: take the fewest repeats."""
    monkeypatch.setattr(timing.milliseconds, "__defaults__", (1.0,))


def test_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "new" / "softmax.json", tmp_path / "new" / "softmax.png"
    rows = bench.run("softmax", device="cpu", only=LABEL, providers="reference,torch", json=file, plot=picture)
    record = json.loads(file.read_text())
    assert set(record) == {"date", "device", "versions", "commit", "dtype", "ceilings", "unit", "rows"}
    assert record["device"]["type"] == "cpu" and record["dtype"] == "float32"
    assert record["versions"]["torch"] == torch.__version__
    assert record["date"].startswith("20") and record["date"].endswith("+00:00")
    assert all(value > 0 for value in record["ceilings"].values())
    assert [(r["provider"], r["direction"]) for r in record["rows"]] == [
        (provider, direction) for provider in ("reference", "torch") for direction in ("fwd", "bwd")
    ]
    for row, written in zip(rows, record["rows"], strict=True):
        assert (written["op"], written["case"]) == ("softmax", LABEL)
        assert written["ms"] == row.ms > 0
        n_bytes = 1024 * 768 * 4 * (2 if row.direction == "fwd" else 3)
        assert written["rate"] == pytest.approx(n_bytes / (row.ms * 1e-3))
        assert written["share"] == pytest.approx(written["rate"] / record["ceilings"]["bytes_per_s"])
        assert written["accurate"] is (True if written["ours"] else None)
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert LABEL in out and "reference" in out and "yes" in out and "50304" not in out


def test_a_wrong_backend_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ModuleType("wrong_softmax")
    wrong.softmax_fwd = lambda x, mask, causal: torch.softmax(x, -1) * 1.0001  # type: ignore[attr-defined]
    wrong.softmax_bwd = lambda dy, y: y * (dy - (dy * y).sum(-1, keepdim=True))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    row = Backend("wrong", wrong.__name__, frozenset({"cpu"}), frozenset({torch.float32}))
    monkeypatch.setitem(BACKENDS, "softmax", (row,))
    monkeypatch.setattr(registry, "NAMES", (*registry.NAMES, "wrong"))
    rows = bench.run("softmax", device="cpu", only=LABEL, json=tmp_path / "wrong.json", plot=tmp_path / "wrong.png")
    ours = {r.direction: r for r in rows if r.provider == "wrong"}
    assert set(ours) == {"fwd", "bwd"}
    assert all(r.accurate is False and r.ms is None and r.rate is None for r in ours.values())
    assert all("softmax: error" in r.note for r in ours.values())
    assert all(r.ms for r in rows if r.provider != "wrong")
    out = capsys.readouterr().out
    assert "NO" in out and "wrong: softmax: error" in out


def test_only_the_providers_asked_for() -> None:
    rows = bench.run("softmax", device="cpu", only=LABEL, providers="torch")
    assert [r.provider for r in rows] == ["torch", "torch"] and all(r.ms for r in rows)


def test_best_peer_is_the_fastest_on_the_same_case() -> None:
    def row(provider: str, ms: float | None, case: str = "a", direction: str = "fwd") -> bench.Row:
        return bench.Row("softmax", case, direction, provider, provider == "us", ms, 1.0, 1.0, None)

    us = row("us", 1.0)
    rows = [us, row("x", 3.0), row("y", 2.0), row("z", None), row("w", 0.1, case="b"), row("v", 0.1, direction="bwd")]
    assert bench.best_peer(rows, us) == row("y", 2.0)
    assert bench.best_peer([us], us) is None


def test_unknown_op_and_device_are_refused() -> None:
    with pytest.raises(InputError, match="unknown benchmark 'conv'; choose one of: softmax, layer_norm, rms_norm"):
        bench.run("conv")
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        bench.run("softmax", device="tpu")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What benchmarks/softmax.py runs."""
    file = tmp_path / "out.json"
    bench.main("softmax", ["--device", "cpu", "--only", LABEL, "--providers", "reference", "--json", str(file)])
    assert [r["provider"] for r in json.loads(file.read_text())["rows"]] == ["reference"] * 2
    with pytest.raises(SystemExit):
        bench.main("softmax", ["--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err
