"""Copies of launchers and jitted functions on the stand-ins of this package."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from . import machine
from .machine import Block, Machine, MBarrier
from .values import LANGUAGE, Int, Pointer, Shared


def _warp_specialize(parts: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
    machine.running().run(machine.block(), [functools.partial(function, *args) for function, args in parts])


_LANGUAGE = types.SimpleNamespace(
    **LANGUAGE,
    program_id=lambda axis: Int(machine.block().program),
    num_programs=lambda axis: Int(machine.running().grid),
    allocate_shared_memory=machine.shared_memory,
    warp_specialize=_warp_specialize,
)
# By the names that kernels know them by: of modules, of instructions, and of what is inline assembly.
_STAND_INS: dict[str, Any] = {
    "gl": _LANGUAGE,
    "tl": _LANGUAGE,
    "mbarrier": MBarrier,
    "tma": types.SimpleNamespace(store_wait=machine.tma_store_wait),
    "TensorDescriptor": machine.Descriptor,
    "tma_load": machine.tma_load,
    "tma_store": machine.tma_store,
    "tma_reduce_add": functools.partial(machine.tma_store, add=True),
    "fence_async_shared": lambda: None,
    "reinterpreted": lambda memory, dtype, shape, layout: Shared(memory.data.reshape(shape)),
    "warpgroup_mma": machine.product,
    "warpgroup_mma_wait": machine.product_wait,
    "named_barrier_sync": machine.named_barrier,
    "named_barrier_arrive": functools.partial(machine.named_barrier, waits=False),
    "wait_turn": machine.wait_turn,
    "end_turn": machine.count_up,
    "draw": machine.count_up,
    "drawn": lambda ticket: ticket,
    "reciprocal": lambda x: 1.0 / x,
    "memory_of": lambda x: x,
    "Descriptor": lambda descriptor: descriptor,
    "launch": lambda kernel, grid, *args, descriptors=(), **constants: kernel[grid](*descriptors, *args, **constants),
}


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    return Int(x) if type(x) is int else x


class _Kernel:
    """Launched as a jitted kernel is. Thread blocks start in order, `processors` of them at a time."""

    def __init__(self, function: Callable[..., object], processors: int, seed: int) -> None:
        self.function, self.processors, self.seed = function, processors, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid[0])

    def _launch(self, grid: int, *args: Any, **options: Any) -> None:
        state = Machine(grid, self.seed)
        machine.start(state)
        options = {k: v for k, v in options.items() if not k.startswith("num_")}
        given, programs = [_argument(x) for x in args], iter(range(grid))

        def processor() -> None:
            while True:
                with state.changed:
                    program = next(programs, None)
                if program is None:
                    return
                state.local.block = Block(program)
                self.function(*given, **options)

        state.run(None, [processor] * min(self.processors, grid))


class _Rebuilt:
    """Functions on stand-ins, each once; the names that they see are those of their own modules."""

    def __init__(self, package: str, processors: int, seed: int) -> None:
        self.package, self.processors, self.seed = package, processors, seed
        self.names: dict[int, dict[str, Any]] = {}
        self.functions: dict[types.FunctionType, types.FunctionType] = {}

    def function(self, original: types.FunctionType) -> types.FunctionType:
        if original not in self.functions:
            names = self.names.get(id(original.__globals__))
            if names is None:
                names = self.names[id(original.__globals__)] = {}
                names |= {name: self.value(name, value) for name, value in list(original.__globals__.items())}
            rebuilt = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
            self.functions[original] = rebuilt
        return self.functions[original]

    def value(self, name: str, value: Any) -> Any:
        if name in _STAND_INS:
            return _STAND_INS[name]
        if type(value).__name__ == "constexpr":
            return Int(value.value) if type(value.value) is int else value.value
        value = getattr(value, "__wrapped__", value)  # nothing that is kept: a descriptor here holds its tensor
        jitted = getattr(value, "fn", None)
        if isinstance(jitted, types.FunctionType):
            function = self.function(jitted)
            return _Kernel(function, self.processors, self.seed) if name.endswith("_kernel") else function
        if isinstance(value, types.FunctionType) and value.__module__.startswith(self.package):
            return self.function(value)
        return value


def interpreted(function: Any, processors: int = 2, seed: int = 0) -> Callable[..., Any]:
    """A launcher with all kernels that it launches, on CPU tensors of float16, float32 and integers, or one jitted
    function of scalars."""
    plain = getattr(function, "fn", function)
    assert isinstance(plain, types.FunctionType)
    return _Rebuilt(plain.__module__.rpartition(".")[0], processors, seed).function(plain)
