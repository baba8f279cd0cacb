"""Compile every Triton kernel for a GPU that is not here, and report registers, spills and shared memory.

    python -m llmfast.testing.offline --arch 90

The launchers run on CPU tensors with a driver that claims the architecture and compiles instead of launching, so that
what is compiled is exactly what would be launched. Exits with status 1 if one spills more than `--max-spill` bytes.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from .. import ops
from ..ops import registry
from ..ops.registry import BACKENDS
from .accuracy import outputs, upstream
from .cases import (
    ActivationLinearCase,
    AttentionCase,
    Case,
    CrossEntropyCase,
    DecodeAttentionCase,
    EmbeddingCase,
    Fp8LinearCase,
    Fp8LinearCrossEntropyCase,
    Fp8MLPCase,
    LinearCase,
    LinearCrossEntropyCase,
    MLPCase,
    RopeCase,
    RowCase,
    VarlenAttentionCase,
    make_inputs,
)
from .tables import BENCHMARK_CASES


class Compiled(NamedTuple):
    """One compiled kernel: what it needs of a multiprocessor, and the local memory it spills registers to, in bytes."""

    kernel: str
    case: str
    warps: int
    registers: int
    spill: int
    shared: int


# One small case per tile configuration: compilation depends on head dimension, causality and row length alone.
CASES: list[Case] = [
    *(RowCase(op, 2, cols) for op in ("softmax", "layer_norm") for cols in (64, 768, 4096, 16384, 32768, 65536)),
    *(RowCase(op, 2, cols) for op in ("rms_norm", "add_layer_norm", "add_rms_norm") for cols in (768, 8192, 65536)),
    *(RowCase(op, 2, cols) for op in ("gelu", "bias_gelu", "swiglu", "geglu") for cols in (64, 4096)),
    LinearCase(2, 64, 768),
    *(LinearCase(1, cols, 64) for cols in (64, 2048, 8192)),
    Fp8LinearCase(256, 64, 768),
    Fp8MLPCase(256, 64, 768),
    Fp8MLPCase(256, 64, 768, "silu", gated=True, bias=False),
    *(MLPCase(512, 64, 1024, kind) for kind in ("gelu", "gelu_tanh", "silu")),  # Hopper's own kernel
    MLPCase(512, 64, 1024, bias=False),
    ActivationLinearCase(2, 4096, 64),
    ActivationLinearCase(2, 4096, 64, True, "gelu_tanh", gated=False),
    *(RopeCase(1, 2, 2, d, interleaved) for d in (64, 128) for interleaved in (False, True)),
    *(CrossEntropyCase(2, classes) for classes in (64, 4096, 50304)),
    *(LinearCrossEntropyCase(2, 16, classes) for classes in (64, 4096, 50257, 50304)),
    *(Fp8LinearCrossEntropyCase(32, 16, classes) for classes in (50257, 50304)),
    EmbeddingCase(128, 32, 768),
    *(AttentionCase(1, 256, 256, 2, 1, d, causal) for d in (64, 128, 256) for causal in (False, True)),
    *(
        AttentionCase(1, 256, 256, 2, 1, d, True, window=100, softcap=cap)
        for d in (64, 128, 256)
        for cap in (0.0, 50.0)
    ),
    *(VarlenAttentionCase(((200, 200), (56, 56)), 2, 1, d, True) for d in (64, 128)),
    *(AttentionCase(1, 2048, 2048, 2, 1, 64, causal) for causal in (False, True)),  # three warpgroups on sm_90
    AttentionCase(1, 256, 256, 2, 1, 256, True, softcap=500.0),  # more than sm_90's own kernels take
    *(DecodeAttentionCase(1, 1, 2048, 16, h, d, page) for d in (64, 128, 256) for h in (2, 16) for page in (0, 16)),
    DecodeAttentionCase(1, 8, 2048, 16, 2, 128),
    DecodeAttentionCase(1, 1, 2048, 16, 2, 128, counted=False),
    *(DecodeAttentionCase(1, 1, 2048, 8, h, 256, window=512, softcap=50.0) for h in (4, 8)),
]


@contextmanager
def _compiling_for(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, Triton kernels compile for sm_<arch> and are collected with their names instead of being launched."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    compiled: list[tuple[str, Any]] = []
    launch = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = launch(self, *args, **(options | {"warmup": True}))
        compiled.append((self.fn.__name__, kernel))
        return kernel

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.JITFunction, "run", compile_only),
    ):
        yield compiled


def _resources(cubin: bytes, arch: int) -> tuple[int, int]:
    """Registers a thread, and bytes of stack (Triton's kernels use none but for spills), from cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for sm_{arch}: {text.stdout}{text.stderr}")
    return int(found[1]), int(found[2])


def _triton_module(op: str, *_: Any, **__: Any) -> ModuleType:
    """What `registry.choose` would give on a GPU for backend="triton"."""
    return importlib.import_module(next(row.module for row in BACKENDS[op] if row.name == "triton"))


def launches(arch: int, run: Callable[[], object]) -> list[tuple[str, Any]]:
    """Names and compiled kernels of all that `run` would launch on sm_<arch> by Triton's backend."""
    with _compiling_for(arch) as compiled, mock.patch.object(registry, "choose", _triton_module):
        run()
    return compiled


def launched(case: Case, dtype: torch.dtype, arch: int) -> list[tuple[str, Any]]:
    """Names and compiled kernels of all that the case's forward and backward would launch on sm_<arch>."""
    inputs = make_inputs(case, "cpu", dtype)

    def run() -> None:
        outs = outputs(case.ours(*inputs, backend="triton"))
        if case.differentiable:
            torch.autograd.grad(outs, inputs, upstream(outs, torch.ones(case.output)))

    return launches(arch, run)


def _resources_of(compiled: list[tuple[str, Any]], label: str, arch: int) -> list[Compiled]:
    for name, kernel in compiled:
        early, waits = kernel.metadata.launch_pdl, "griddepcontrol.wait" in kernel.asm["ptx"]
        if early != waits:  # it would read what is not written yet, or wait for nothing
            raise RuntimeError(f"{name} for {label}: launched before its predecessor ends is {early}, waits is {waits}")
    return [
        Compiled(name, label, k.metadata.num_warps, *_resources(k.asm["cubin"], arch), k.metadata.shared)
        for name, k in compiled
    ]


def compile_case(case: Case, dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Every kernel that the case's forward and backward would launch on sm_<arch>."""
    return _resources_of(launched(case, dtype, arch), f"{case.label} {str(dtype).removeprefix('torch.')}", arch)


def compile_append_kv(dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Into a cache and into pages, which is no op of a case."""
    cache, new = torch.ones(2, 8, 2, 64, dtype=dtype), torch.ones(2, 1, 2, 64, dtype=dtype)
    one, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    compiled = launches(arch, lambda: ops.append_kv_(cache, cache, new, new, one))
    compiled += launches(arch, lambda: ops.append_kv_(cache, cache, new, new, one, block_table=table))
    return _resources_of(compiled, "append_kv", arch)


def compile_adamw(dtype: torch.dtype, arch: int) -> list[Compiled]:
    """The update of float32 parameters from gradients of `dtype`, with copies of it, which is no op of a case."""
    p, m, v, grad, copy = (torch.ones(4, dtype=t) for t in (*[torch.float32] * 3, dtype, dtype))
    scale = torch.ones(())
    compiled = launches(arch, lambda: ops.adamw_(p, grad, m, v, copy, step=1, learning_rate=0.1, grad_scale=scale))
    return _resources_of(compiled, "adamw", arch)


IN_PLACE = {"append_kv": compile_append_kv, "adamw": compile_adamw}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, as 80, 86, 89, 90, 100")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max-spill", type=int, default=256, help="bytes of stack a thread that a kernel may use")
    parser.add_argument("--op", choices=[*BENCHMARK_CASES, *IN_PLACE], help="only this op")
    options = parser.parse_args()
    rows = [
        row
        for case in CASES
        if options.op in (None, case.op)
        and (not case.op.startswith("fp8_") or options.arch >= 89)  # which has such products
        for row in compile_case(case, getattr(torch, options.dtype), options.arch)
    ]
    for op, compile_op in IN_PLACE.items():
        if options.op in (None, op):
            rows += compile_op(getattr(torch, options.dtype), options.arch)
    for row in rows:
        print(
            f"{row.kernel:32} {row.case:34} warps {row.warps:2} registers {row.registers:3} spill {row.spill:4}"
            f" shared {row.shared:6}"
        )
    spilled = [row for row in rows if row.spill > options.max_spill]
    print(f"{len(rows)} kernels for sm_{options.arch}, {len(spilled)} spill more than {options.max_spill} bytes")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
