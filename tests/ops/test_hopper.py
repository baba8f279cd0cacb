"""The Hopper attention kernels: when they run, how they compute there, and what their machine code must be like."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmfast
from llmfast.testing.accuracy import compare, outputs, upstream
from llmfast.testing.cases import AttentionCase, Case, VarlenAttentionCase, make_inputs
from llmfast.testing.tables import FLASH_ATTENTION_LENGTHS, HOPPER_ATTENTION_CASES

Instruction = tuple[str, str]  # opcode and operands; ("label", its name) for a label


BOTH = ["attention_hopper_fwd", "attention_hopper_bwd"]


def own(case: Case) -> list[str]:
    """Launchers of these kernels that its forward and backward come to: above 128 the backward pass is portable."""
    return BOTH if case.inputs["q"][-1] <= 128 else BOTH[:1]


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


def test_runs_where_tma_can_read() -> None:
    pytest.importorskip("triton")
    limits = importlib.import_module("llmfast.kernels.hopper").hopper_limits
    q, k, v = torch.zeros(2, 5, 3 * 4, 64, dtype=torch.bfloat16).split(4, 2)
    assert limits(q, k, v) is limits(q.half(), k.half(), v.half()) is limits(q, k, v, 50.0) is None
    assert limits(q[..., :40], k[..., :40], v[..., :40]) is None
    assert "multiples of 8, not 36" in limits(q[..., :36], k[..., :36], v[..., :36])
    assert "16-bit types" in limits(q.float(), k.float(), v.float())
    assert "softcap up to 256, not 10000" in limits(q, k, v, 1e4)
    assert "not empty" in limits(q, k[:, :0], v[:, :0])
    wide = torch.zeros(2, 5, 4, 67, dtype=torch.bfloat16)
    assert "strides" in limits(q, wide[..., :64], v)  # of 134 bytes
    odd = torch.zeros(2 * 5 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 5, 4, 64)
    assert "addresses" in limits(q, k, odd)
    large = (torch.zeros(1, 3, 1, 264, dtype=torch.bfloat16),) * 3
    fits = [t[..., :256] for t in large]
    assert limits(*fits) is limits(*fits, 50.0) is None and "up to 256" in limits(*large)
    assert "up to 128" in limits(*fits, direction="bwd")
    assert limits(*(t[..., :128] for t in large), direction="bwd") is None


def test_explain_says_which_kernels(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pytest.importorskip("triton")
    portable = importlib.import_module("llmfast.kernels.attention")
    monkeypatch.setattr(portable, "architecture", lambda device: 90)
    q = torch.zeros(1, 5, 2, 256, dtype=torch.float16, device=device)
    own, other = "sm_90's own kernel", "portable, sm_90's own takes head dimensions up to 128 that are multiples of 8"
    assert f"({'forward: ' + own}; backward: {other}, not 256)" in llmfast.ops.explain("attention", q, q, q)
    starts = torch.tensor([0, 5], dtype=torch.int32, device=device)
    packed = *(q[0, ..., :64],) * 3, starts, starts, 5, 5
    assert f"(forward: {own}; backward: {own})" in llmfast.ops.explain("attention_varlen", *packed)
    monkeypatch.setattr(portable, "architecture", lambda device: 80)
    assert "(portable kernels)" in llmfast.ops.explain("attention", q, q, q)


@pytest.fixture
def launches(hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers of these kernels that are called."""
    called: list[str] = []

    def noting(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            called.append(name)
            return launcher(*args)

        return launch

    for name in BOTH:
        module = importlib.import_module(f"llmfast.kernels.{name.removesuffix('_fwd')}")
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return called


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16), (256, torch.float16), (160, torch.bfloat16)],
)
@pytest.mark.parametrize(("n_queries", "n_keys"), FLASH_ATTENTION_LENGTHS)
def test_against_truth(
    n_queries: int, n_keys: int, head_dim: int, dtype: torch.dtype, causal: bool, launches: list[str]
) -> None:
    case = AttentionCase(2, n_queries, n_keys, 4, 2, head_dim, causal)
    inputs = make_inputs(case, "cuda", dtype)
    comparisons = compare(case, inputs, torch.randn(case.output, device="cuda").to(dtype), "triton")
    assert all(c.ok for c in comparisons), comparisons
    assert launches == own(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER_ATTENTION_CASES, ids=lambda c: c.label.replace(" ", "-")[:99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_windows_caps_and_packed_sequences(case: Case, dtype: torch.dtype, launches: list[str]) -> None:
    inputs = make_inputs(case, "cuda", dtype)
    comparisons = compare(case, inputs, torch.randn(case.output, device="cuda").to(dtype), "triton")
    assert all(c.ok for c in comparisons), comparisons
    assert launches == own(case)


LENGTHS = tuple((239 - n % 5 * 50, 333 - n % 7 * 50) for n in range(60))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    *(AttentionCase(60, 239, 333, 4, 2, d, True, window=100) for d in (64, 128, 256)),
    *(AttentionCase(60, 239, 333, 4, 2, d, False, softcap=20.0) for d in (64, 128, 256)),
    *(VarlenAttentionCase(LENGTHS, 4, 2, d, causal) for d in (64, 128, 256) for causal in (False, True)),
    VarlenAttentionCase(((2100, 2100),) * 8, 4, 2, 64, True, window=300),
], ids=lambda c: c.label.replace(" ", "-")[-60:])  # fmt: skip
def test_repeats_bitwise(case: Case, launches: list[str]) -> None:
    """250 repeats at a large batch: a missing barrier, or turn, shows as a difference in some of them."""
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    grad = torch.randn(case.output, device="cuda").bfloat16()

    def once() -> list[torch.Tensor]:
        outs = outputs(case.ours(*inputs, backend="triton"))
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, upstream(outs, grad))]

    first, different = once(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(250):
        for a, b in zip(first, once(), strict=True):
            different += (a != b).sum()
    assert int(different) == 0 and all(t.isfinite().all() for t in first)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_other_sequences_do_not_matter(head_dim: int, causal: bool, launches: list[str]) -> None:
    """NaN in one packed sequence spoils neither the one before nor the one after, of which it shares tiles."""
    case = VarlenAttentionCase(((70, 70), (90, 90), (70, 70)), 4, 2, head_dim, causal)
    tensors = make_inputs(case, "cuda", torch.bfloat16)
    grad = torch.randn(case.output, device="cuda").bfloat16()
    spoilt = [t.detach().clone() for t in (*tensors, grad)]
    for t in spoilt:
        t[70:160] = float("nan")
    results = []
    for given, dout in ((tensors, grad), ([t.requires_grad_() for t in spoilt[:3]], spoilt[3])):
        out = case.ours(*given, backend="triton")
        results.append([out.detach(), *torch.autograd.grad(out, given, dout)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:70], b[:70]) and torch.equal(a[160:], b[160:]) and b[70:160].isnan().any()
    assert launches == own(case) * 2


COMPILE = """
import subprocess, sys, torch, triton
from pathlib import Path
from llmfast.testing import offline
from llmfast.testing.cases import AttentionCase, VarlenAttentionCase, make_inputs

tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
CASES = {
    f"{head_dim} {length} {'causal' if causal else 'full'}": AttentionCase(1, length, length, 2, 1, head_dim, causal)
    for head_dim, length in ((64, 256), (64, 2048), (128, 256), (256, 256))
    for causal in (False, True)
}
for head_dim in (64, 128, 256):
    lengths = ((200, 200), (56, 56))
    CASES[f"{head_dim} 256 packed window"] = VarlenAttentionCase(lengths, 2, 1, head_dim, True, window=100)
    CASES[f"{head_dim} 256 window capped"] = AttentionCase(1, 256, 256, 2, 1, head_dim, True, window=100, softcap=20.0)
CASES["64 2048 window"] = AttentionCase(1, 2048, 2048, 2, 1, 64, True, window=100)
for name, case in CASES.items():
    inputs = make_inputs(case, "cpu", torch.bfloat16)
    if case.head_dim <= 128 and "2048" not in name:
        compiled = offline.launched(case, torch.bfloat16, 90)
    else:
        compiled = offline.launches(90, lambda: case.ours(*inputs, backend="triton"))
    for kernel_name, kernel in compiled:
        direction = kernel_name.removeprefix("_attention_hopper_").removesuffix("_kernel")
        if direction in ("fwd", "bwd"):
            cubin = Path(sys.argv[1], f"{direction} {name}")
            cubin.write_bytes(kernel.asm["cubin"])
            with open(f"{cubin}.sass", "w") as file:
                subprocess.run([tool, cubin], stdout=file, check=True)
"""


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Instruction]]:
    """Of each case of COMPILE, forward, and backward, whose kernel is one for all lengths, up to 128. Compiled in a
    process of its own: Triton's interpreter, which this one may have chosen, compiles nothing."""
    pytest.importorskip("triton")
    where = tmp_path_factory.mktemp("sass")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(llmfast.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, where], env=env, check=True)
    code = {file.stem: instructions(file.read_text()) for file in where.glob("*.sass")}
    assert len(code) == 15 + 8
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
    branches = [(i, re.search(r"\.L_x_\d+", to)) for i, (op, to) in enumerate(code) if op == "@BRA"]
    jumps = [(i, labels[to[0]]) for i, to in branches if to]
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


def spills(loop: list[Instruction]) -> int:
    return sum(op.split(".")[0] in ("LDL", "STL") for op, _ in loop)


def test_inner_loops(machine_code: dict[str, list[Instruction]]) -> None:
    """Forward, one for each warpgroup. The scores of a block and the output of the one before are started together,
    before the wait for either, so that the tensor cores go through both without a gap. Nothing is spilled by Triton
    3.6; by 3.9 one number at 256, and 12 of three warpgroups with a window."""
    for case, code in machine_code.items():
        direction, head_dim, length, *_ = case.split()
        keys = 64 if head_dim == "256" else 128
        loops = steady_loops(code)
        assert len(loops) == (3 if length == "2048" else 2), case
        for loop in loops if direction == "fwd" else []:
            ops = [op for op, _ in loop]
            products = [i for i, op in enumerate(ops) if op.startswith("HGMMA")]
            waits = [i for i, op in enumerate(ops) if op.startswith("WARPGROUP.DEPBAR")]
            assert len(products) == int(head_dim) // 16 + keys // 16 and len(waits) == 2, case
            assert products[-1] < waits[0], case
            assert ops.count("MUFU.EX2") == (keys if "capped" in case else keys // 2) + 2, case
            assert spills(loop) <= (24 if case == "fwd 64 2048 window" else head_dim == "256"), case


def test_inner_loops_backward(machine_code: dict[str, list[Instruction]]) -> None:
    """A step's products are waited for four times, not each on its own as ptxas has it when it gives up (C7510, C7514);
    what is spilled is little beside their operands: by Triton 3.6 at most 10 instructions, 21 with windows."""
    for case, code in machine_code.items():
        head_dim = int(case.split()[1])
        queries = 128 if head_dim == 64 else 64
        for loop in steady_loops(code) if case.startswith("bwd") else []:
            ops = [op for op, _ in loop]
            # S and dP over head_dim, dV and dK over the queries, dQ over 128 keys, in pieces of 16.
            assert sum(op.startswith("HGMMA") for op in ops) == (2 * head_dim + 2 * queries + 128) // 16, case
            assert sum(op.startswith("WARPGROUP.DEPBAR") for op in ops) == 4, case
            assert ops.count("MUFU.EX2") == (queries if "capped" in case else queries // 2), case
            assert spills(loop) <= (64 if "capped" in case else 28 if "window" in case else 24), case
