"""The Hopper attention kernel: when it runs, how it computes there, and what its machine code must be like."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmfast
from llmfast.testing.accuracy import compare
from llmfast.testing.cases import AttentionCase, make_inputs
from llmfast.testing.tables import FLASH_ATTENTION_LENGTHS

Instruction = tuple[str, str]  # opcode and operands; ("label", its name) for a label


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


def test_runs_where_tma_can_read() -> None:
    pytest.importorskip("triton")
    runs = importlib.import_module("llmfast.kernels.hopper").runs_on_hopper
    q, k, v = torch.zeros(2, 5, 3 * 4, 64, dtype=torch.bfloat16).split(4, 2)
    assert runs(q, k, v) and runs(q.half(), k.half(), v.half())
    assert runs(q[..., :40], k[..., :40], v[..., :40]) and not runs(q[..., :36], k[..., :36], v[..., :36])
    assert not runs(q.float(), k.float(), v.float())
    assert not runs(q, k[:, :0], v[:, :0])
    wide = torch.zeros(2, 5, 4, 67, dtype=torch.bfloat16)
    assert not runs(q, wide[..., :64], v)  # strides of 134 bytes
    assert not runs(q, k, torch.zeros(2 * 5 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 5, 4, 64))  # odd address
    assert not runs(*(torch.zeros(1, 3, 1, 256, dtype=torch.bfloat16),) * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
@pytest.mark.parametrize(("n_queries", "n_keys"), FLASH_ATTENTION_LENGTHS)
def test_against_truth(
    n_queries: int, n_keys: int, head_dim: int, dtype: torch.dtype, causal: bool, hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Forward by this kernel, and the backward that its statistics serve."""
    kernels, launches = importlib.import_module("llmfast.kernels.attention_hopper"), []
    launch = kernels.attention_hopper_fwd
    monkeypatch.setattr(kernels, "attention_hopper_fwd", lambda *args: launches.append(launch(*args)))
    case = AttentionCase(2, n_queries, n_keys, 4, 2, head_dim, causal)
    inputs = make_inputs(case, "cuda", dtype)
    comparisons = compare(case, inputs, torch.randn(case.output, device="cuda").to(dtype), "triton")
    assert all(c.ok for c in comparisons), comparisons
    assert len(launches) == 1


COMPILE = """
import subprocess, sys, torch, triton
from pathlib import Path
from llmfast.testing import offline
from llmfast.testing.cases import AttentionCase, make_inputs

tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
for head_dim, length in ((64, 256), (64, 2048), (128, 256)):
    for causal in (False, True):
        case = AttentionCase(1, length, length, 2, 1, head_dim, causal)
        inputs = make_inputs(case, "cpu", torch.bfloat16)
        (_, kernel), = offline.launches(90, lambda: case.ours(*inputs, backend="triton"))
        cubin = Path(sys.argv[1], f"{head_dim} {length} {'causal' if causal else 'full'}")
        cubin.write_bytes(kernel.asm["cubin"])
        with open(f"{cubin}.sass", "w") as file:
            subprocess.run([tool, cubin], stdout=file, check=True)
"""


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Instruction]]:
    """Of each case of COMPILE, which runs in a process of its own, without Triton's interpreter."""
    pytest.importorskip("triton")
    where = tmp_path_factory.mktemp("sass")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(llmfast.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, where], env=env, check=True)
    code = {file.stem: instructions(file.read_text()) for file in where.glob("*.sass")}
    assert len(code) == 6
    return code


def instructions(sass: str) -> list[Instruction]:
    """Predicates are left out, but a conditional branch is "@BRA"."""
    found = re.findall(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", sass, re.M)
    return [
        ("label", label) if label else ("@BRA" if predicate and op == "BRA" else op, operands)
        for label, predicate, op, operands in found
    ]


def steady_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with tensor core instructions, without what a branch inside them jumps over: masks."""
    labels = {name: i for i, (op, name) in enumerate(code) if op == "label"}
    jumps = [(i, labels[to[2:-1]]) for i, (op, to) in enumerate(code) if op == "@BRA" and "L_x" in to]
    loops = [(to, i) for i, to in jumps if to < i and any(op.startswith("HGMMA") for op, _ in code[to:i])]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [
        [code[i] for i in range(first, last) if not any(first < a < i < b < last for a, b in jumps)]
        for first, last in innermost
    ]


def overwritten(code: list[Instruction]) -> list[Instruction]:
    """Instructions that write a register which a tensor core product, started and not waited for, reads. ptxas before
    13.3 can emit them (https://github.com/triton-lang/triton/issues/9433)."""
    pending: list[set[int]] = [set()]  # registers read by each group of products; the last is not closed
    found = []
    for op, operands in code:
        if op.startswith("HGMMA"):
            if read := re.match(r"R\d+, R(\d+), gdesc", operands):
                pending[-1] |= set(range(int(read[1]), int(read[1]) + 4))
            if "gsb0" in operands:
                pending.append(set())
        elif op.startswith("WARPGROUP.DEPBAR"):
            left = int(operands.split(",")[1], 16)
            pending = [*pending[len(pending) - 1 - left : -1], pending[-1]] if left < len(pending) else pending
        elif not op.startswith(("ST", "BAR", "SYNCS", "BRA", "@BRA", "RED", "ATOM", "UTMA")):
            written = re.match(r"R(\d+)", operands)
            if written and any(int(written[1]) in group for group in pending):
                found.append((op, operands))
    return found


def test_overwritten_operands_are_found() -> None:
    product = ("HGMMA.64x64x16.F32.BF16", "R88, R148, gdesc[UR16].tnspB, R88, gsb0")
    scores = ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR16], RZ, !UPT, gsb0")
    write, one, none = ("FADD", "R150, R1, R2"), *(("WARPGROUP.DEPBAR.LE", f"gsb0, 0x{n}") for n in (1, 0))
    assert overwritten([product, write, none]) == [write] and overwritten([product, none, write]) == []
    assert overwritten([scores, product, one, write, none]) == [write]
    assert overwritten([product, scores, one, write, none]) == []
    assert overwritten([product, ("FADD", "R152, R150, R2"), none]) == []


def test_operands_are_not_overwritten(machine_code: dict[str, list[Instruction]]) -> None:
    for case, code in machine_code.items():
        assert any(op.startswith("HGMMA") for op, _ in code)
        assert overwritten(code) == [], case


def test_inner_loops(machine_code: dict[str, list[Instruction]]) -> None:
    """One for each warpgroup. The scores of a block and the output of the one before are started together, before the
    wait for either, so that the tensor cores go through both without a gap; nothing is spilled."""
    for case, code in machine_code.items():
        head_dim, length, _ = case.split()
        loops = steady_loops(code)
        assert len(loops) == (3 if length == "2048" else 2), case
        for loop in loops:
            ops = [op for op, _ in loop]
            products = [i for i, op in enumerate(ops) if op.startswith("HGMMA")]
            waits = [i for i, op in enumerate(ops) if op.startswith("WARPGROUP.DEPBAR")]
            assert len(products) == int(head_dim) // 16 + 128 // 16 and len(waits) == 2, case
            assert products[-1] < waits[0], case
            assert ops.count("MUFU.EX2") == 64 + 2, case
            assert not {"LDL", "STL"} & {op.split(".")[0] for op in ops}, case
