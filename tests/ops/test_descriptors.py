"""TMA descriptors are made and encoded once for each memory, shape and tile, and keep no memory from being freed.

Triton's own launcher, without a GPU, shows what a kernel is launched with: what the tensors of each call say.
"""

import importlib
import itertools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from llmfast.testing.launcher import UTILS, descriptors_in, launcher  # noqa: E402

_launch = importlib.import_module("llmfast.kernels._launch")
hopper = importlib.import_module("llmfast.kernels.hopper")
FAR = 2**31 - 2**16


def _body(a_desc, b_desc, c, SIZE: triton.language.constexpr):
    pass


class Kernel(JITFunction):
    """Compiles nothing, and knows the arguments that it was launched with."""

    def __init__(self) -> None:
        super().__init__(_body)
        self.by_triton = 0
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        self.by_triton += 1
        return super().__getitem__(grid)

    def _do_compile(self, key: str, signature: Any, device: int, *_: Any) -> CompiledKernel:
        kernel: Any = object.__new__(CompiledKernel)
        kernel.module, kernel.function, kernel.packed_metadata = None, 0, ()
        target = GPUTarget("cuda", 90, 32)
        kernel.metadata = SimpleNamespace(target=target, tensordesc_meta=descriptors_in(signature))
        kernel.launch_metadata = lambda *args: None
        kernel._run = self.launcher(signature)
        self.device_caches[device][0][key] = kernel
        return kernel

    def launcher(self, signature: dict[str, Any]) -> Any:
        return launcher(signature, lambda before, args: self.launched.append(args))


@pytest.fixture(autouse=True)
def driver() -> Iterator[SimpleNamespace]:
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: driver.device,
        get_current_stream=lambda device: 0,
        utils=UTILS,
        device=0,
    )
    hopper._head_tiles.cache_clear()
    hopper._plain_tiles.cache_clear()
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        yield driver


def at(base: torch.Tensor, offset: int, *shape_and_strides: tuple[int, ...]) -> torch.Tensor:
    return base.as_strided(*shape_and_strides, offset)


BFLOAT = torch.zeros(2**16, dtype=torch.bfloat16)
FLOAT = torch.zeros(2**12)
SHAPE, STRIDES = (3, 24, 3, 64), (24 * 3 * 64, 3 * 64, 64, 1)
# Each differs from the first in one part of what a descriptor says.
HEADS = [
    (at(BFLOAT, 0, SHAPE, STRIDES), 64, 64),
    (at(BFLOAT, 8, SHAPE, STRIDES), 64, 64),
    (at(BFLOAT.view(torch.float16), 0, SHAPE, STRIDES), 64, 64),
    *((at(BFLOAT, 0, (*SHAPE[:i], SHAPE[i] - 1, *SHAPE[i + 1 :]), STRIDES), 64, 64) for i in range(3)),
    (at(BFLOAT, 0, (*SHAPE[:3], 56), STRIDES), 64, 64),
    *((at(BFLOAT, 0, SHAPE, (*STRIDES[:i], STRIDES[i] + 8, *STRIDES[i + 1 :])), 64, 64) for i in range(3)),
    (at(BFLOAT, 0, SHAPE, STRIDES), 128, 64),
    (at(BFLOAT, 0, SHAPE, STRIDES), 64, 128),
]
FLOATS = [
    (at(FLOAT, 0, (16, 64), (64, 1)), (8, 64), 128),
    (at(FLOAT, 64, (16, 64), (64, 1)), (8, 64), 128),
    (at(FLOAT, 0, (8, 64), (64, 1)), (8, 64), 128),
    (at(FLOAT, 0, (16, 64), (128, 1)), (8, 64), 128),
    (at(FLOAT, 0, (16, 64), (64, 1)), (16, 64), 128),
    (at(FLOAT, 0, (16, 64), (64, 1)), (8, 64), 64),
]


def encoded(x: torch.Tensor, shape: list[int], strides: list[int]) -> tuple[Any, ...]:
    """What Triton's launcher makes of a descriptor: the encoded one, shape, strides."""
    return (x.data_ptr(), tuple(shape), tuple(strides)), *shape, *strides


def head(x: torch.Tensor, rows: int, cols: int, packed: bool) -> tuple[Any, ...]:
    (batch, length, heads, head_dim), (sequence, row, apart, _) = x.shape, x.stride()
    if packed:
        return encoded(x, [FAR, FAR, heads, 2**30, head_dim], [2**34 - row, row, apart, row, 1])
    return encoded(x, [batch, heads, length, head_dim], [sequence, apart, row, 1])


def said(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a launch without what is alike in all encodings here."""
    return tuple((a[0], a[5], a[6]) if isinstance(a, tuple) else a for a in args)


def test_each_launch_takes_what_its_tensors_say() -> None:
    kernel = Kernel()
    calls = [(x, rows, cols, packed) for x, rows, cols in HEADS for packed in (False, True)]
    for (x, *tile), (y, *float_tile) in [(c, f) for c in calls for f in FLOATS] * 2:
        descriptors = hopper.head_tiles(x, *tile), hopper.plain_tiles(y, *float_tile)
        block, float_block = (d.tritons.block_shape for d in descriptors)
        assert block == [1] * (3 if tile[-1] else 2) + tile[:2] and float_block == list(float_tile[0])
        assert descriptors[0].tritons.base.dtype is x.dtype
        assert descriptors[0].tritons.layout.swizzle_byte_width == 128
        assert descriptors[1].tritons.layout.swizzle_byte_width == float_tile[1]
        assert descriptors[1].tritons.layout.element_bitwidth == 32
        _launch.launch(kernel, (1,), 5, descriptors=descriptors, SIZE=64)
        expected = *head(x, *tile), *encoded(y, list(y.shape), list(y.stride())), 5
        assert said(kernel.launched[-1][: len(expected)]) == expected
    assert hopper._head_tiles.cache_info().misses == len(calls)
    assert hopper._plain_tiles.cache_info().misses == len(FLOATS)


def test_plain_tiles_of_16_bits() -> None:
    descriptor = hopper.plain_tiles(at(BFLOAT, 0, (16, 64), (64, 1)), (8, 64), 128).tritons
    assert descriptor.layout.element_bitwidth == 16 and descriptor.base.dtype is torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_stride_of_one_element_is_aligned(dim: int) -> None:
    shape, strides = ((*t[:dim], n, *t[dim + 1 :]) for t, n in ((SHAPE, 1), (STRIDES, 3)))
    x = at(BFLOAT, 0, shape, strides)
    assert hopper.tma_readable(x)
    sequence, row, head = (8 if i == dim else s for i, s in enumerate(strides[:3]))
    assert hopper.head_tiles(x, 64, 64).tritons.strides == [sequence, head, row, 1]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_tma_cannot_read(dim: int) -> None:
    def readable(offset: int = 0, shape: tuple[int, ...] = SHAPE, strides: tuple[int, ...] = STRIDES) -> bool:
        return hopper.tma_readable(at(BFLOAT, offset, shape, strides))

    assert readable() and readable(8) and not readable(4)
    assert not readable(shape=(*SHAPE[:dim], 0, *SHAPE[dim + 1 :]))
    assert not readable(strides=(*STRIDES[:dim], 0, *STRIDES[dim + 1 :]))
    assert not readable(strides=(*STRIDES[:dim], STRIDES[dim] + 4, *STRIDES[dim + 1 :]))
    assert not readable(strides=(*STRIDES[:3], 2))


def test_the_same_is_launched_as_by_triton() -> None:
    ours, reference = Kernel(), Kernel()
    for (x, *tile), (y, *other) in itertools.product(HEADS, repeat=2):
        descriptors = hopper.head_tiles(x, *tile), hopper.head_tiles(y, *other, True)
        _launch.launch(ours, (1,), 5, descriptors=descriptors, SIZE=64)
        reference[(1,)](*[d.tritons for d in descriptors], 5, SIZE=64)
        assert ours.launched[-1][:21] == reference.launched[-1][:21]  # what follows stands for a constexpr
        assert len(ours.launched[-1]) == len(reference.launched[-1])
    assert ours.by_triton == len({(x.dtype, *tile) for x, *tile in HEADS}) ** 2 == len(ours.device_caches[0][0])


def test_each_is_encoded_once(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one argument of one compiled kernel: what a device, another kernel, another argument encode is their own."""
    encode = mock.Mock(side_effect=lambda *args: args[0])
    monkeypatch.setattr(driver, "utils", SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode))
    kernels = Kernel(), Kernel()
    (x, *tile), (y, *other) = HEADS[:2]
    counts = []
    for device in (0, 0, 1, 1, 0):
        driver.device = device
        for kernel in kernels:
            for _ in range(3):
                descriptors = hopper.head_tiles(x, *tile), hopper.head_tiles(y, *other)
                _launch.launch(kernel, (1,), 5, descriptors=descriptors, SIZE=64)
                descriptors = hopper.head_tiles(x, *tile), hopper.head_tiles(x, *tile)
                _launch.launch(kernel, (1,), 5, descriptors=descriptors, SIZE=64)
        counts.append(encode.call_count)
    # By Triton, two; then x and y, and x as the second argument.
    assert counts == [10, 10, 20, 20, 20] and all(kernel.by_triton == 2 for kernel in kernels)


def test_no_tensor_is_kept() -> None:
    kernel = Kernel()
    x, y = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    freed = [weakref.ref(x), weakref.ref(y)]
    for _ in range(3):
        descriptors = hopper.head_tiles(x[:, 1:], 64, 64), hopper.plain_tiles(y, (64, 64), 128)
        _launch.launch(kernel, (1,), 5, descriptors=descriptors, SIZE=64)
    del x, y
    assert [tensor() for tensor in freed] == [None, None]
    assert hopper._head_tiles.cache_info().hits == hopper._plain_tiles.cache_info().hits == 2


def test_no_more_are_kept_than_a_large_model_needs() -> None:
    for offset in range(hopper.KEPT + 10):
        last = hopper.head_tiles(at(BFLOAT, 8 * offset, (1, 1, 1, 64), (64, 64, 64, 1)), 64, 64)
        hopper.plain_tiles(at(FLOAT, offset % 900 * 4, (1 + offset // 900, 64), (64, 1)), (64, 64), 128)
    assert hopper._head_tiles.cache_info().currsize == hopper._plain_tiles.cache_info().currsize == hopper.KEPT
    first = weakref.ref(last)
    del last
    assert first() is not None
    hopper._head_tiles.cache_clear()
    assert first() is None


def test_triton_launches_where_somebody_watches_or_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *tile = HEADS[0]
    kernel, other = Kernel(), Kernel()
    other.launcher = lambda signature: lambda *args: other.launched.append(args)  # type: ignore[method-assign]
    for count in (1, 2):
        _launch.launch(other, (1,), 5, descriptors=(hopper.head_tiles(x, *tile),) * 2, SIZE=64)
        _launch.launch(kernel, (1,), 5, descriptors=(hopper.head_tiles(x, *tile),) * 2, SIZE=64)
        assert other.by_triton == count and kernel.by_triton == 1
    first = kernel.launched[0]
    for where, name, value in [(knobs.runtime, "debug", True), (_launch, "_RUN", None)]:
        with monkeypatch.context() as inside:
            inside.setattr(where, name, value)
            before = kernel.by_triton
            _launch.launch(kernel, (1,), 5, descriptors=(hopper.head_tiles(x, *tile),) * 2, SIZE=64)
            assert kernel.by_triton == before + 1
    # One of them as an argument of another kind.
    before = kernel.by_triton
    one = hopper.head_tiles(x, *tile)
    for _ in range(2):
        _launch.launch(kernel, (1,), one.tritons, 5, descriptors=(one,), SIZE=64)
    assert kernel.by_triton == before + 2 and all(args[:19] == first[:19] for args in kernel.launched)
