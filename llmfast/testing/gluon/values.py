"""What kernels compute with: integers, tensors in registers, addresses, shared memory."""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_OPERATIONS = "add sub mul floordiv mod radd rsub rmul neg and xor eq ne lt le gt ge"


def _operation(name: str) -> Callable[..., Any]:
    def operation(*operands: Any) -> Any:
        result = getattr(int, name)(*operands)
        if result is NotImplemented:
            return result
        if name in ("__floordiv__", "__mod__"):
            assert operands[0] >= 0 and operands[1] > 0, f"{name} of {operands}: Python and C disagree"
        return Int(result)

    return operation


class Int(int):
    """An integer or a truth value of a kernel, or a constant."""

    @property
    def value(self) -> int:
        return int(self)

    def to(self, dtype: Any) -> "Int":
        return self


for _name in _OPERATIONS.split():
    setattr(Int, f"__{_name}__", _operation(f"__{_name}__"))
Int.__hash__ = int.__hash__


class Array(np.ndarray):
    """A tensor in registers."""

    @property
    def type(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    def permute(self, order: list[int]) -> Any:
        return self.transpose(order)


def array(x: Any) -> Any:
    """As a tensor in registers."""
    return np.asarray(x).view(Array)


def value(x: Any) -> Any:
    """What NumPy gave, as a kernel's value: an array of no dimension is a scalar."""
    if isinstance(x, np.ndarray) and x.ndim:
        return x.view(Array)
    x = x.item() if isinstance(x, np.ndarray | np.generic) else x
    return Int(x) if type(x) is int else x


def memory(tensor: torch.Tensor) -> np.ndarray:
    """All of the storage that a tensor lies in."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,), 0).numpy()


class Pointer:
    """Addresses in a tensor's memory, counted from its first element."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset, self.memory = tensor, offset, memory(tensor)
        self.dtype = types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def places(self) -> np.ndarray:
        return np.asarray(self.offset) + self.tensor.storage_offset()


class Shared:
    """Shared memory, or barriers in it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype
        self.layout = None

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.data.transpose(order))

    def load(self, layout: Any) -> Array:
        return array(self.data.copy())

    def store(self, x: Array) -> None:
        self.data[...] = x


class Layout:
    """Any layout: none is modelled."""

    def __init__(self, *_: Any) -> None:
        pass


def _load(pointer: Pointer, mask: Any = True, other: Any = 0.0) -> Any:
    place, there = np.broadcast_arrays(pointer.places(), np.asarray(mask, bool))
    values = pointer.memory[np.where(there, place, 0)]
    return value(np.where(there, values, np.asarray(other, values.dtype)))


def _store(pointer: Pointer, values: Any, mask: Any = True) -> None:
    place, there, given = np.broadcast_arrays(pointer.places(), np.asarray(mask, bool), np.asarray(values))
    pointer.memory[place[there]] = given[there]


def _where(condition: Any, a: Any, b: Any) -> Any:
    return value(np.where(condition, a, b)) if isinstance(condition, np.ndarray) else (a if condition else b)


# The parts of gl and tl that know nothing of threads.
LANGUAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "constexpr": None,
    "load": _load,
    "store": _store,
    "where": _where,
    "cdiv": lambda a, b: (a + b - 1) // b,
    "static_range": range,
    "minimum": lambda a, b: value(np.minimum(a, b)),
    "maximum": lambda a, b: value(np.maximum(a, b)),
    "max": lambda x, axis: value(x.max(axis)),
    "sum": lambda x, axis: x.sum(axis),
    "exp2": np.exp2,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "log2": np.log2,
    "arange": lambda first, end, layout=None: array(np.arange(first, end)),
    "zeros": lambda shape, dtype, layout=None: array(np.zeros(shape, dtype)),
    "zeros_like": np.zeros_like,
    "full": lambda shape, x, dtype, layout=None: array(np.full(shape, x, dtype)),
    "reshape": lambda x, shape: x.reshape(shape),
    "permute": lambda x, order: x.permute(order),
    "convert_layout": lambda x, layout: x,
    "num_warps": lambda: 4,
    "NVMMADistributedLayout": Layout,
    "NVMMASharedLayout": Layout,
    "SwizzledSharedLayout": Layout,
    "DotOperandLayout": Layout,
    "SliceLayout": Layout,
    "BlockedLayout": Layout,
}
