"""Cases of the ops over rows: softmax, normalisations, activations, and an activation with the layer behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.reference import fp8_product
from .base import Defaults, Result, Work


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _with_input(norm: Callable[..., Tensor], total: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return norm(total, *parameters), total


# PyTorch's own function of each op over rows, at the tensors' dtype.
_TORCH: dict[str, Callable[..., Result]] = {
    "softmax": lambda x: F.softmax(x, dim=-1),
    "layer_norm": _torch_layer_norm,
    "rms_norm": _torch_rms_norm,
    "add_layer_norm": lambda x, residual, *parameters: _with_input(_torch_layer_norm, x + residual, *parameters),
    "add_rms_norm": lambda x, residual, *parameters: _with_input(_torch_rms_norm, x + residual, *parameters),
    "gelu": F.gelu,
    "bias_gelu": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
# Names of each op's tensors, and whether each is a row vector.
ROW_INPUTS: dict[str, dict[str, bool]] = {
    "softmax": {"x": False},
    "layer_norm": {"x": False, "weight": True, "bias": True},
    "rms_norm": {"x": False, "weight": True},
    "add_layer_norm": {"x": False, "residual": False, "weight": True, "bias": True},
    "add_rms_norm": {"x": False, "residual": False, "weight": True},
    "gelu": {"x": False},
    "bias_gelu": {"x": False, "bias": True},
    "swiglu": {"gate": False, "up": False},
    "geglu": {"gate": False, "up": False},
}
_ROW_OPTIONS: dict[str, dict[str, Any]] = {"bias_gelu": {"approximate": "tanh"}}
# Tensors of (rows, cols) that must be read or written, forward and backward.
_ROW_PASSES: dict[str, tuple[int, int]] = {
    "add_layer_norm": (4, 4),
    "add_rms_norm": (4, 4),
    "swiglu": (3, 5),
    "geglu": (3, 5),
}
_EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6, "add_layer_norm": 1e-5, "add_rms_norm": 1e-6}


@dataclass(frozen=True)
class RowCase(Defaults):
    """`op` over (rows, cols)."""

    op: str
    rows: int
    cols: int

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the op's tensors, in order."""
        shape = (self.rows, self.cols)
        return {name: shape[1:] if vector else shape for name, vector in ROW_INPUTS[self.op].items()}

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.cols

    @property
    def amplification(self) -> float:
        """1/sqrt(eps), for the normalisation of a constant row."""
        return _EPS[self.op] ** -0.5 if self.op in _EPS else 1.0

    def ours(self, *tensors: Tensor, backend: str) -> Result:
        return getattr(ops, self.op)(*tensors, **_ROW_OPTIONS.get(self.op, {}), backend=backend)

    def torch(self, *tensors: Tensor) -> Result:
        """PyTorch's own function at the tensors' dtype."""
        return _TORCH[self.op](*tensors)

    def work(self, direction: str, itemsize: int) -> Work:
        passes = _ROW_PASSES.get(self.op, (2, 3))[direction == "bwd"]
        return Work(float(passes * self.rows * self.cols * itemsize), 0.0)


@dataclass(frozen=True)
class LinearCase(Defaults):
    """(rows, cols) through a layer to (rows, width)."""

    rows: int
    cols: int
    width: int
    bias: bool = True
    op: str = "linear"

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols}x{self.width}" + " bias" * self.bias

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.width

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        shapes = {"x": (self.rows, self.cols), "weight": (self.width, self.cols)}
        return shapes | ({"bias": (self.width,)} if self.bias else {})

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return ops.linear(*tensors, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        return F.linear(*tensors)

    def work(self, direction: str, itemsize: int) -> Work:
        """Matrix products: one forward, two backward; of a single row, reading the weight, and writing its gradient."""
        times = self.cols * self.width * (1 if direction == "fwd" else 2)
        return Work(times * itemsize, 0.0) if self.rows == 1 else Work(0.0, 2.0 * self.rows * times)


@dataclass(frozen=True)
class Fp8LinearCase(LinearCase):
    """The same by 8-bit floats."""

    op: str = "fp8_linear"

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return ops.fp8_linear(*tensors, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """PyTorch's product at the tensors' dtype, of what 8 bits hold."""
        y = fp8_product(*tensors[:2])
        return y + tensors[2] if self.bias else y


@dataclass(frozen=True)
class MLPCase(Defaults):
    """(rows, cols) through an MLP of `hidden`, gated or not, back to (rows, cols)."""

    rows: int
    cols: int
    hidden: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    op: str = "mlp"

    @property
    def label(self) -> str:
        label = f"{self.rows}x{self.cols}x{self.hidden} {self.activation}"
        return label + " gated" * self.gated + " bias" * self.bias

    @property
    def plain(self) -> bool:
        """Whether the C++ can."""
        return self.activation != "silu" or self.gated

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.cols

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        width = self.hidden * (2 if self.gated else 1)
        shapes = {"x": (self.rows, self.cols), "up": (width, self.cols), "down": (self.cols, self.hidden)}
        return shapes | ({"up_bias": (width,), "down_bias": (self.cols,)} if self.bias else {})

    def prepare(self, tensors: list[Tensor]) -> None:
        """Weights as models have them, which keep the size of what goes through."""
        for weight in tensors[1:3]:
            weight *= weight.shape[1] ** -0.5

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        x, up, down, *biases = tensors
        up_bias, down_bias = biases or (None, None)
        op = getattr(ops, self.op)
        return op(x, up, up_bias, down, down_bias, activation=self.activation, backend=backend)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def torch(self, *tensors: Tensor) -> Tensor:
        """PyTorch's functions one after another at the tensors' dtype."""
        x, up, down, *biases = tensors
        up_bias, down_bias = biases or (None, None)
        h = self.product(x, up) if up_bias is None else self.product(x, up) + up_bias
        first, second = h.chunk(2, -1) if self.gated else (h, None)
        y = F.silu(first) if self.activation == "silu" else F.gelu(first, approximate=_APPROXIMATE[self.activation])
        out = self.product(y if second is None else y * second, down)
        return out if down_bias is None else out + down_bias

    def work(self, direction: str, itemsize: int) -> Work:
        """Matrix products: one each forward, two backward."""
        weights = self.cols * self.hidden * (3 if self.gated else 2)
        return Work(0.0, 2.0 * self.rows * weights * (1 if direction == "fwd" else 2))


@dataclass(frozen=True)
class Fp8MLPCase(MLPCase):
    """The same by products of what 8 bits hold."""

    op: str = "fp8_mlp"

    def looseness(self, result: Tensor) -> float:
        """What goes down is near the middle of two 8-bit numbers now and then; 16 bits decide which it becomes."""
        return 6.0

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return fp8_product(x, weight)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True)
class ActivationLinearCase(Defaults):
    """act(x) * up of (rows, cols) through a layer to (rows, width)."""

    rows: int
    cols: int
    width: int
    bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    op: str = "activation_linear"

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols}x{self.width} {self.activation}" + " gated" * self.gated + " bias" * self.bias

    @property
    def plain(self) -> bool:
        """Whether the C++ can: of silu only what models have."""
        return self.activation != "silu" or (self.gated and not self.bias)

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.width

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        rows = self.rows, self.cols
        shapes = {"x": rows, "up": rows, "x_bias": rows[1:], "weight": (self.width, self.cols), "bias": (self.width,)}
        wanted = {"x", "weight"} | ({"up"} if self.gated else set()) | ({"bias", "x_bias"} if self.bias else set())
        return {name: shape for name, shape in shapes.items() if name in wanted}

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        named = dict(zip(self.inputs, tensors, strict=True))
        return ops.activation_linear(**named, activation=self.activation, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """PyTorch's own functions one after another, at the tensors' dtype."""
        named = dict(zip(self.inputs, tensors, strict=True))
        h = named["x"] + named["x_bias"] if self.bias else named["x"]
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        y = F.silu(h) if self.activation == "silu" else F.gelu(h, approximate=approximate)
        return F.linear(y * named["up"] if self.gated else y, named["weight"], named.get("bias"))

    def work(self, direction: str, itemsize: int) -> Work:
        """Matrix products: one forward, two backward."""
        return Work(0.0, 2.0 * self.rows * self.cols * self.width * (1 if direction == "fwd" else 2))
