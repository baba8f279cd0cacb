"""Every kernel compiles for a GPU that is not here, within the limit on spilled registers."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmfast

KERNELS = Path(llmfast.__file__).resolve().parents[1] / "kernels"


def entry_kernels() -> set[str]:
    """Names of the functions in kernels/ that are decorated with triton.jit or gluon.jit and end in _kernel."""
    found = set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
                if {"triton.jit", "gluon.jit"} & set(map(ast.unparse, decorators)):
                    found.add(node.name)
    return found


def offline(*options: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, because Triton's interpreter, which this one may have chosen, compiles nothing."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(KERNELS.parent), env.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "llmfast.testing.offline", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_every_kernel_compiles_for_hopper_within_the_limit_on_spills() -> None:
    done = offline("--arch", "90", "--dtype", "bfloat16")
    assert "kernels for sm_90" in done.stdout, done.stderr
    rows = [line for line in done.stdout.splitlines() if " registers " in line]
    compiled = {row.split()[0] for row in rows}
    assert len(entry_kernels()) > 8 and compiled == entry_kernels()
    assert done.returncode == 0, done.stdout
    registers = [int(re.search(r"registers +(\d+)", row)[1]) for row in rows]
    assert all(0 < n <= 255 for n in registers) and len(set(registers)) > 5


def test_the_limit_on_spills_decides_the_exit_status() -> None:
    assert offline("--arch", "90", "--op", "layer_norm", "--max-spill", "-1").returncode == 1
    assert offline("--arch", "90", "--op", "layer_norm", "--max-spill", "0").returncode == 0  # it spills nothing


COUNT = """
import torch
from llmfast.testing import offline
from llmfast.testing.cases import CrossEntropyCase, LinearCrossEntropyCase, RopeCase, RowCase

SHAPES = [(2, 4000), (3, 4001), (17, 3333), (64, 2400), (1, 4096)]
OPS = {
    "softmax": [RowCase("softmax", *s) for s in SHAPES],
    "swiglu": [RowCase("swiglu", *s) for s in SHAPES],
    "bias_gelu": [RowCase("bias_gelu", *s) for s in SHAPES],
    "cross_entropy": [CrossEntropyCase(*s) for s in SHAPES],
    "linear_cross_entropy": [LinearCrossEntropyCase(rows, 16, classes) for rows, classes in SHAPES],
    "rope": [RopeCase(b, t, h, 64) for b, t, h in [(1, 7, 3), (2, 16, 12), (5, 1, 1), (3, 100, 16)]],
    "layer_norm": [RowCase("layer_norm", rows, 768) for rows in (1, 2, 3, 17, 64, 1000)],
    "add_rms_norm": [RowCase("add_rms_norm", rows, 768) for rows in (1, 2, 3, 17, 64, 1000)],
}
seen = {}
for op, cases in OPS.items():
    for case in cases:
        for name, kernel in offline.launched(case, torch.bfloat16, 90):
            seen.setdefault((op, name), set()).add(kernel.hash)
for (op, name), hashes in seen.items():
    print(op, name, len(hashes))
"""


def test_shapes_of_a_class_share_their_kernels() -> None:
    """Triton tells integers apart that are 1, multiples of 16 and others: with rows and strides that gives a few
    variants; one for each length would be compiled anew for each."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(KERNELS.parent), env.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COUNT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert len(counts) > 12
    assert counts.pop("rope _rope_kernel") <= 8  # its forward and backward are one function
    assert max(counts.values()) <= 4, counts


PATHS = """
import torch
from llmfast.testing import offline
from llmfast.testing.cases import AttentionCase

for arch, dtype, head_dim in [
    (90, torch.bfloat16, 64), (90, torch.float16, 80), (90, torch.bfloat16, 256), (90, torch.float32, 256),
    (80, torch.bfloat16, 64),
]:
    names = [name for name, _ in offline.launched(AttentionCase(1, 9, 9, 2, 1, head_dim, True), dtype, arch)]
    print(arch, dtype, head_dim, *(name for name in names if "_fwd_" in name or "_bwd_" in name or "dkdv" in name))
"""


def test_attention_takes_the_hopper_kernels_where_they_run() -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(KERNELS.parent), env.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PATHS], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "90 torch.bfloat16 64 _attention_hopper_fwd_kernel _attention_hopper_bwd_kernel",
        "90 torch.float16 80 _attention_hopper_fwd_kernel _attention_hopper_bwd_kernel",
        "90 torch.bfloat16 256 _attention_hopper_fwd_kernel _attention_dkdv_kernel",
        "90 torch.float32 256 _attention_fwd_kernel _attention_dkdv_kernel",
        "80 torch.bfloat16 64 _attention_fwd_kernel _attention_dkdv_kernel",
    ], done.stderr
