"""Kernels that are compiled already are launched without Triton's Python, the same ones that Triton would launch.

No kernel is compiled or run here: a driver without a device and a compiler that only notes what it is asked for show
which compiled kernel a call reaches, and with what.
"""

import ast
import functools
import importlib
import importlib.util
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import llmfast

triton = pytest.importorskip("triton")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

_launch = importlib.import_module("llmfast.kernels._launch")
KERNELS = Path(llmfast.__file__).resolve().parents[1] / "kernels"


def _body(a, b, c, d, e, FLAG: triton.language.constexpr, SIZE: triton.language.constexpr):
    pass


class Kernel(JITFunction):
    """Compiles nothing, and knows what was launched: (Triton's key of a compiled kernel, arguments) each."""

    def __init__(self, backend: str = "cuda") -> None:
        super().__init__(_body, do_not_specialize=["d", "e"])
        self.backend = backend
        self.by_triton = 0
        self.launched: list[tuple[str, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        self.by_triton += 1
        return super().__getitem__(grid)

    def _do_compile(self, key: str, signature: Any, device: int, *_: Any) -> CompiledKernel:
        kernel: Any = object.__new__(CompiledKernel)
        kernel.module, kernel.function, kernel.packed_metadata = None, f"function on {device}", ("metadata",)
        kernel.metadata = SimpleNamespace(target=GPUTarget(self.backend, 90, 32))
        kernel.launch_metadata = lambda *args: "launch metadata"
        kernel._run = lambda *args: self.launched.append((f"{device} {key}", args))
        self.device_caches[device][0][key] = kernel
        return kernel


class Driver:
    device, stream = 0, 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 * device + self.stream


@pytest.fixture
def driver() -> Iterator[Driver]:
    with mock.patch.object(triton.runtime.driver, "_active", Driver()) as driver:
        yield driver


ROWS = torch.zeros(64)
ARGS = (ROWS, 100, 0.5, 5, (3, 4))


def test_known_versions_launch_without_triton(driver: Driver) -> None:
    """So that nobody loses it unawares: pyproject.toml allows no other versions."""
    assert _launch.KNOWN
    kernel = Kernel()
    for n in (100, 101, 2**31 - 1, -7):  # integers of one class
        _launch.launch(kernel, (n, 2), ROWS, n, 0.5, 5, (n, 4), FLAG=True, SIZE=64)
    assert kernel.by_triton == 1 and len({key for key, _ in kernel.launched}) == 1
    _, (x, y, z, stream, function, metadata, *nothing, a, b, c, d, e, _, _) = kernel.launched[-1]
    assert (x, y, z, stream, function, metadata) == (-7, 2, 1, 7, "function on 0", ("metadata",))
    assert nothing == [None, None, None] and a is ROWS and (b, c, d, e) == (-7, 0.5, 5, (-7, 4))
    assert len(kernel.launched[0][1]) == len(kernel.launched[1][1])


def test_a_variant_launches_as_a_kernel_with_its_constants(driver: Driver) -> None:
    kernel = Kernel()
    constants = [{"FLAG": flag, "SIZE": 64, "num_warps": warps} for flag in (True, False) for warps in (4, 8)]
    variants = [_launch.Variant(kernel, **c) for c in constants]
    for variant in variants * 2:
        variant.launch((1,), *ARGS)
    assert kernel.by_triton == 4 and len({key for key, _ in kernel.launched}) == 4


INTEGERS = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.int64)
TENSORS = [torch.zeros(64, dtype=dtype)[start:] for dtype in DTYPES for start in (0, 1, 2, 4, 8, 16)]
LAYOUTS = [gl.NVMMASharedLayout(width, 32, rank) for width in (0, 128) for rank in (1, 2)]
DESCRIPTORS = [TensorDescriptor(ROWS, [64], [1], [n], LAYOUTS[i]) for n in (32, 64) for i in (0, 2)]
DESCRIPTORS += [TensorDescriptor(torch.zeros(64, 32), [n, 32], [32, 1], [8, 32], LAYOUTS[3]) for n in (8, 64)]
SCALARS = st.sampled_from([*INTEGERS, True, False, 1.0, 0.0, 2.5, None])
PLAIN = st.one_of(SCALARS, st.sampled_from([*TENSORS, torch.nn.Parameter(ROWS), torch.nn.Parameter(ROWS[1:])]))
ARGUMENT = st.one_of(
    PLAIN, PLAIN, st.sampled_from(DESCRIPTORS), st.lists(PLAIN, min_size=1, max_size=3).map(tuple),
    st.tuples(st.sampled_from(INTEGERS), st.tuples(SCALARS, SCALARS)),
)  # fmt: skip
CONSTANTS = st.permutations(["FLAG", "SIZE", "num_warps"]).flatmap(
    lambda names: st.fixed_dictionaries(
        {n: st.sampled_from([4, 8] if n == "num_warps" else [0, 1, 2, True, False, None, "a", "FLAG"]) for n in names}
    )
)
CALL = st.tuples(st.tuples(*[ARGUMENT] * 5), CONSTANTS)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(CALL, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), ARGUMENT), max_size=30),
)
@example([((0,) * 5, {"FLAG": 0, "SIZE": 0}), ((0, 0, 0, 0, 2**31), {"FLAG": 0, "SIZE": False})], [])
def test_every_call_reaches_the_kernel_that_triton_would_launch(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], changes: list[tuple[int, int, Any]]
) -> None:
    """Calls, and calls that differ from one of them in one argument: often in what compiles alike, often not."""
    for which, at, value in changes:
        args, constants = calls[which % len(calls)]
        calls.append(((*args[:at], value, *args[at + 1 :]), constants))
    with mock.patch.object(triton.runtime.driver, "_active", Driver()):
        ours, reference = Kernel(), Kernel()
        for args, constants in calls * 2:
            _launch.launch(ours, (1,), *args, **constants)
            reference[(1,)](*args, **constants)
            (key, launched), (expected, by_triton) = ours.launched[-1], reference.launched[-1]
            assert key == expected
            assert all(x is y for x, y in zip(launched[9:14], by_triton[9:14], strict=True))
            assert len(launched) == len(by_triton)
        assert len(ours.launched) == len(reference.launched) and ours.by_triton <= len(calls)


def test_devices_and_streams_are_those_of_the_call(driver: Driver) -> None:
    kernel, seen = Kernel(), []
    for device, stream in [(0, 7), (1, 7), (0, 8), (1, 9), (0, 7)] * 2:
        driver.device, driver.stream = device, stream
        _launch.launch(kernel, (1,), *ARGS, FLAG=True, SIZE=64)
        key, (_, _, _, used, function, *_) = kernel.launched[-1]
        assert used == 100 * device + stream and function == f"function on {device}"
        seen.append(key)
    assert kernel.by_triton == 2 == len(set(seen))


def test_another_driver_starts_anew() -> None:
    kernel = Kernel()
    for _ in range(3):
        with mock.patch.object(triton.runtime.driver, "_active", Driver()):
            for _ in range(2):
                _launch.launch(kernel, (1,), *ARGS, FLAG=True, SIZE=64)
    assert kernel.by_triton == 3 and len(kernel.launched) == 6


def test_threads_reach_their_own_kernels(driver: Driver) -> None:
    kernel, failed, here = Kernel(), [], threading.local()
    launched = kernel.launched
    kernel.launched = SimpleNamespace(append=lambda call: setattr(here, "call", call))  # type: ignore[assignment]
    choices = [(t, n) for t in TENSORS for n in (1, 16, 17, 2**31)]
    expected = {}
    for i, (t, n) in enumerate(choices):
        Kernel.run(kernel, t, n, 0.5, 5, (3, 4), FLAG=True, SIZE=64, grid=(1,), warmup=False)
        expected[i] = here.call[0]

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(300):
            i = order.randrange(len(choices))
            t, n = choices[i]
            _launch.launch(kernel, (1,), t, n, 0.5, 5, (3, 4), FLAG=True, SIZE=64)
            key, args = here.call
            if key != expected[i] or args[9] is not t or args[10] != n:
                failed.append((i, key))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not launched and kernel.by_triton <= 8 * len(choices)


def _hook(end: str, chain: bool) -> Callable[[pytest.MonkeyPatch, Kernel], object]:
    def watch(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
        if chain:
            monkeypatch.setattr(getattr(knobs.runtime, f"launch_{end}_hook"), "calls", [print])
        else:
            monkeypatch.setattr(knobs.runtime, f"launch_{end}_hook", lambda metadata: None)

    return watch


def _replaced_run(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: run(self, *args, **options))


WATCHERS: dict[str, Callable[[pytest.MonkeyPatch, Kernel], object]] = {
    "enter hook": _hook("enter", True),
    "exit hook": _hook("exit", True),
    "another enter hook": _hook("enter", False),
    "another exit hook": _hook("exit", False),
    "pre-run hook": lambda monkeypatch, kernel: kernel.add_pre_run_hook(lambda *args, **options: None),
    "debug": lambda monkeypatch, kernel: monkeypatch.setattr(knobs.runtime, "debug", True),
    "instrumentation": lambda monkeypatch, kernel: monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "x"),
    "stages": lambda monkeypatch, kernel: monkeypatch.setattr(
        knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")
    ),
    "another way to run": _replaced_run,
    "unknown version": lambda monkeypatch, kernel: monkeypatch.setattr(_launch, "_RUN", None),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_triton_launches_where_somebody_watches(watcher: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    for _ in range(2):
        _launch.launch(kernel, (1,), *ARGS, FLAG=True, SIZE=64)
    assert kernel.by_triton == 1
    with monkeypatch.context() as inside:
        WATCHERS[watcher](inside, kernel)
        for _ in range(2):
            _launch.launch(kernel, (1,), *ARGS, FLAG=True, SIZE=64)
        assert kernel.by_triton == 3
    kernel.pre_run_hooks.clear()
    _launch.launch(kernel, (1,), *ARGS, FLAG=True, SIZE=64)
    assert kernel.by_triton == 3 and len(kernel.launched) == 5


def test_triton_launches_where_it_was_replaced_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a wrapper that looks like the original, or by no function at all."""
    spec = importlib.util.spec_from_file_location("llmfast.kernels._launch_again", KERNELS / "_launch.py")
    assert spec is not None and spec.loader is not None
    for run in (functools.wraps(JITFunction.run)(lambda *args, **options: None), functools.partial(print)):
        with monkeypatch.context() as inside:
            inside.setattr(JITFunction, "run", run)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module._RUN is None


def test_amd_and_arguments_by_name_are_left_to_triton(driver: Driver) -> None:
    kernel, amd = Kernel(), Kernel("hip")
    for _ in range(3):
        _launch.launch(kernel, (1,), *ARGS[:4], e=2, FLAG=True, SIZE=64)
        _launch.launch(kernel, (1,), *ARGS, True, SIZE=64)
        _launch.launch(amd, (1,), *ARGS, FLAG=True, SIZE=64)
    assert kernel.by_triton == 6 and amd.by_triton == 3


def test_every_launcher_launches_so() -> None:
    direct = [
        f"{file.name}:{node.lineno}"
        for file in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and file.name != "_launch.py"
    ]
    assert not direct


AGAIN = """
from types import SimpleNamespace
from unittest import mock
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from llmfast.testing import offline
from llmfast.testing.launcher import UTILS, descriptors_in, launcher

ran, seen = [], {}

def compile_nothing(self, key, signature, device, *_):
    kernel = object.__new__(CompiledKernel)
    kernel.module, kernel.function, kernel.packed_metadata = None, 0, ()
    kernel.metadata = SimpleNamespace(target=GPUTarget("cuda", 90, 32), tensordesc_meta=descriptors_in(signature))
    kernel.launch_metadata = lambda *args: None
    kernel._run = launcher(signature, lambda before, args: ran.append((self.__name__, key, len(before), len(args))))
    self.device_caches[device][0][key] = kernel
    return kernel

def by_triton(self, grid):
    seen["by_triton"] = seen.get("by_triton", 0) + 1
    return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

for arch in (80, 90):
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=UTILS,
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.JITFunction, "_do_compile", compile_nothing),
        mock.patch.object(triton.JITFunction, "__getitem__", by_triton),
        mock.patch.object(offline.registry, "choose", offline._triton_module),
        mock.patch.object(offline, "_compiling_for", lambda arch: mock.MagicMock()),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            for case in offline.CASES:
                calls = []
                for _ in range(2):
                    ran.clear()
                    seen.clear()
                    offline.launched(case, dtype, arch)
                    calls.append((sorted(ran), seen.get("by_triton", 0)))
                assert calls[0][0] == calls[1][0] and calls[0][0], (case, calls)
                assert calls[1][1] == 0, (case, calls)
                print(*{name for name, *_ in ran}, sep="\\n")
"""


def test_what_was_launched_once_is_launched_without_triton() -> None:
    """Every kernel of every op, for two architectures: the second time the same ones, and none by Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(KERNELS.parent), env.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", AGAIN], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) > 20
