"""What kernels run on: threads, barriers, copies between global and shared memory, and products of tiles."""

import functools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .values import Array, Int, Layout, Pointer, Shared, array, memory

Action = Callable[[], object]


class Deadlock(RuntimeError):
    """Every thread waits."""


class Block:
    """What the threads of one thread block share: its number, and hardware barriers, (arrived, times filled)."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.named: dict[int, tuple[int, int]] = {}


class Machine:
    """The state of one launch. One lock guards all of it; `asleep` counts threads that have looked since it changed."""

    def __init__(self, grid: int, seed: int) -> None:
        self.grid, self.changed, self.random = grid, threading.Condition(), random.Random(seed)
        self.awake = self.asleep = 0
        self.error: BaseException | None = None
        self.local = threading.local()

    def change(self) -> None:
        self.asleep = 0
        self.changed.notify_all()

    def wait(self, ready: Callable[[], object]) -> None:
        with self.changed:
            while self.error is None and not ready():
                self.asleep += 1
                if self.asleep == self.awake:
                    self.error = Deadlock(f"{self.awake} threads wait")
                    self.changed.notify_all()
                else:
                    self.changed.wait()
            if self.error is not None:
                raise self.error

    def run(self, block: Block | None, functions: list[Action]) -> None:
        """All at once, to their ends. The thread of a block that waits for its partitions is one of them instead."""
        left = [len(functions), block is not None]
        with self.changed:
            self.awake += len(functions) - left[1]
        threads = [threading.Thread(target=self._thread, args=(block, function, left)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _thread(self, block: Block | None, function: Action, left: list[int]) -> None:
        self.local.block, self.local.products, self.local.copies = block, [], []
        try:
            with np.errstate(all="ignore"):
                function()
            assert not self.local.products and not self.local.copies, "something is not waited for"
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
        with self.changed:
            left[0] -= 1
            if left[0] or not left[1]:
                self.awake -= 1
            self.change()

    def later(self, queue: list[Action], action: Action) -> None:
        """Now, with all that was started before, or when it is waited for."""
        queue.append(action)
        if self.random.random() < 0.5:
            self.settle(queue, 0)

    def settle(self, queue: list[Action], left: int) -> None:
        while len(queue) > left:
            queue.pop(0)()


_running: Machine


def start(machine: Machine) -> None:
    global _running
    _running = machine


def running() -> Machine:
    return _running


def block() -> Block:
    return _running.local.block


class _Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all the bytes that were announced."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0


def shared_memory(dtype: Any, shape: list[int], layout: Any) -> Shared:
    """Full of NaN or of the least integer; what int64 is allocated for is barriers."""
    if dtype is np.int64:
        data = np.empty(shape, object)
        for i in range(data.size):
            data.flat[i] = _Barrier()
        return Shared(data)
    return Shared(np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -(2**31), dtype))


class MBarrier:
    """triton.experimental.gluon.language.nvidia.hopper.mbarrier."""

    MBarrierLayout = Layout

    @staticmethod
    def init(bar: Shared, count: int) -> None:
        bar.data.flat[0].count = bar.data.flat[0].missing = count

    @staticmethod
    def count(bar: Shared, arrivals: int, announced: int) -> None:
        one = bar.data.flat[0]
        with _running.changed:
            one.missing -= arrivals
            one.bytes += announced
            assert one.missing >= 0, "more arrive at a barrier than it counts"
            if one.missing == 0 and one.bytes == 0:
                one.phase, one.missing = one.phase + 1, one.count
            _running.change()

    @staticmethod
    def expect(bar: Shared, announced: int) -> None:
        MBarrier.count(bar, 1, announced)

    @staticmethod
    def arrive(bar: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            MBarrier.count(bar, count, 0)

    @staticmethod
    def wait(bar: Shared, phase: int, pred: Any = True) -> None:
        one = bar.data.flat[0]
        if pred:
            _running.wait(lambda: one.phase % 2 != phase)


def named_barrier(number: int, threads: int, waits: bool = True) -> None:
    """Of warpgroups, and of a single warp that waits, where the number of threads says so."""
    named, mine = block().named, 32 if waits and threads % 128 else 128
    with _running.changed:
        arrived, times = named.get(number, (0, 0))
        assert arrived + mine <= threads, "more arrive at a hardware barrier than it counts"
        full = arrived + mine == threads
        named[number] = (0, times + 1) if full else (arrived + mine, times)
        _running.change()
    if waits and not full:
        _running.wait(lambda: named[number][1] > times)


@dataclass
class Descriptor:
    """TensorDescriptor, with what TMA asks of one."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Layout | None

    def __post_init__(self) -> None:
        size = self.base.element_size()
        assert len(self.shape) == len(self.strides) == len(self.block_shape) <= 5
        assert all(0 < n <= 2**32 for n in self.shape) and all(n <= 256 for n in self.block_shape[:-1])
        assert all(s * size % 16 == 0 and 0 < s * size < 2**40 for s in self.strides[:-1]) and self.strides[-1] == 1
        self.dtype = memory(self.base).dtype

    def tile(self, at: Any) -> tuple[np.ndarray, np.ndarray]:
        """Places of its elements in the tensor's memory, and which there are; 64-bit addresses wrap around."""
        at = [int(c) for c in at]
        dims = list(zip(self.block_shape, at, self.shape, self.strides, strict=True))
        size = self.base.element_size()
        first = sum(c * stride for _, c, _, stride in dims) * size % 2**64 // size
        relative = functools.reduce(np.add.outer, [np.arange(n) * stride for n, _, _, stride in dims])
        inside = [(0 <= np.arange(n) + c) & (np.arange(n) + c < length) for n, c, length, _ in dims]
        there = functools.reduce(np.logical_and.outer, inside)
        return relative[there] + (first + int(self.base.storage_offset()) if there.any() else 0), there


def tma_load(desc: Descriptor, at: Any, bar: Shared, target: Shared) -> None:
    place, there = desc.tile(at)
    tile = np.zeros(there.shape, target.dtype)
    tile[there] = memory(desc.base)[place]
    target.data[...] = tile.reshape(target.data.shape)
    MBarrier.count(bar, 0, -tile.nbytes)


def tma_store(desc: Descriptor, at: Any, source: Shared, add: bool = False) -> None:
    def copy() -> None:
        place, there = desc.tile(at)
        with _running.changed:
            given = source.data.reshape(there.shape)[there]
            memory(desc.base)[place] = memory(desc.base)[place] + given if add else given

    _running.later(_running.local.copies, copy)


def tma_store_wait(left: int) -> None:
    _running.settle(_running.local.copies, left)


def product(a: Any, b: Any, acc: Array, use_acc: bool = True, is_async: bool = False) -> Array:
    """warpgroup_mma: NaN until it is waited for."""
    result = array(np.full(acc.shape, np.nan, np.float32))

    def multiply() -> None:
        x, y = (np.asarray(f if isinstance(f, Array) else f.data, np.float32) for f in (a, b))
        result[...] = x @ y + (acc if use_acc else 0.0)

    _running.later(_running.local.products, multiply)
    return result


def product_wait(left: int, deps: list[Array]) -> Any:
    _running.settle(_running.local.products, left)
    return deps[0] if len(deps) == 1 else tuple(deps)


def wait_turn(turn: Pointer, number: int) -> None:
    _running.wait(lambda: turn.memory[turn.places()] == number)


def count_up(counter: Pointer) -> Int:
    """Add 1 once what this thread has copied is there; -> what it was."""
    _running.settle(_running.local.copies, 0)
    with _running.changed:
        number = int(counter.memory[counter.places()])
        counter.memory[counter.places()] = number + 1
        _running.change()
    return Int(number)
