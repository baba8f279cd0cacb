"""What setup.py builds, what it leaves out and why, and that a stale or missing library is refused with the remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmfast.errors import BackendError
from llmfast.native import library
from llmfast.native.sources import source_hash

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_compiler
def test_our_declarations_are_torchs(tmp_path: Path) -> None:
    """csrc/torch_abi.h beside torch's own headers: another signature would be a conflicting declaration."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "drift.cpp"
    headers = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h", "torch_abi.h")
    source.write_text("#define USE_CUDA 1\n" + "".join(f"#include <{h}>\n" for h in headers))
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = (
        (ROOT / "csrc/torch_abi.h")
        .read_text()
        .replace("int32_t torch_get_num_threads(uint32_t*", "void torch_get_num_threads(int*")
    )
    (tmp_path / "torch_abi.h").write_text(wrong)
    done = subprocess.run(
        [c.replace(str(ROOT / "csrc"), str(tmp_path)) for c in command], capture_output=True, text=True
    )
    assert done.returncode != 0 and "torch_get_num_threads" in done.stderr


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` of a copy of the sources, with no CUDA unless asked for."""
    checkout = folder / "checkout"
    if not checkout.exists():
        for name in ("csrc", "kernels", "llmfast"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "build.json"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, checkout / name)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLMFAST_") and k != "CXX"}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, env=inherited | {"LLMFAST_CUDA": "0"} | environment, capture_output=True, text=True,
    )  # fmt: skip


def record(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "checkout/llmfast/native/build.json").read_text())


@pytest.mark.parametrize(("compiler", "reason"), [
    ("/nowhere/g++", "no C++ compiler (/nowhere/g++ is not on the path); install g++"),
    ("false", "the compiler failed: "),
])  # fmt: skip
def test_without_a_working_compiler(compiler: str, reason: str, tmp_path: Path) -> None:
    """The build goes through with a reason; LLMFAST_STRICT makes it an error."""
    done = build(tmp_path, CXX=compiler)
    assert done.returncode == 0 and f"the cpu library was not built: {reason}" in done.stderr
    assert record(tmp_path)["cpu"]["built"] is False and str(record(tmp_path)["cpu"]["reason"]).startswith(reason)
    strict = build(tmp_path, CXX=compiler, LLMFAST_STRICT="1")
    assert strict.returncode != 0 and f"the cpu library was not built: {reason}" in strict.stderr


@needs_compiler
def test_wrong_architectures_are_refused(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    done = build(tmp_path, LLMFAST_CUDA="1", LLMFAST_CUDA_ARCHS="hopper", CXX="true")
    assert "LLMFAST_CUDA_ARCHS is 'hopper'; give numbers as in 80;90a" in done.stderr


def test_the_hash_covers_every_source(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    csrc = tmp_path / "csrc"
    before = {name: source_hash(csrc, name) for name in ("cpu", "cuda")}
    for file, changed in (("torch_abi.h", {"cpu", "cuda"}), ("cpu/norm.h", {"cpu"}), ("cuda/softmax.cu", {"cuda"})):
        text = (csrc / file).read_text()
        (csrc / file).write_text(text + "// another\n")
        assert {name for name in before if source_hash(csrc, name) != before[name]} == changed
        (csrc / file).write_text(text)
    assert {name: source_hash(csrc, name) for name in before} == before


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading as for the first time."""
    monkeypatch.setattr(library, "load", library.load.__wrapped__)


def test_a_stale_library_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "source_hash", lambda csrc, name: "0123456789abcdef")
    with pytest.raises(
        BackendError, match="_cpu.so was built from other sources .*; rebuild it with: pip install -e ."
    ):
        library.load("cpu")
    assert library.describe("cpu").startswith("no: ")


def test_a_missing_library_says_why(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    with pytest.raises(
        BackendError, match="the cpu library was not built: there is no record of a build; run: pip ins"
    ):
        library.load("cpu")
    (tmp_path / "build.json").write_text('{"cpu": {"built": false, "reason": "no C++ compiler; install g++"}}')
    with pytest.raises(BackendError, match="the cpu library was not built: no C[+][+] compiler; install g[+][+]"):
        library.load("cpu")
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match="_cpu.so cannot be loaded: .*; rebuild it with"):
        library.load("cpu")


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "from llmfast import ops; import torch; ops.softmax(torch.ones(2), backend='cpp')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"LLMFAST_CPU": "avx1024"}, capture_output=True, text=True
    )
    assert "LLMFAST_CPU is 'avx1024', which this CPU or build lacks; choose baseline, avx2" in done.stderr
