"""What the public ops refuse, each by name, and the dtype and shape of what they return."""

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import InputError
from llmfast.ops import arguments, checks
from llmfast.ops.registry import BACKENDS
from llmfast.testing.accuracy import outputs


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


HALF = torch.float16
ELSEWHERE = "meta"  # a second device that every machine has
IDS = torch.tensor([0, 1])


def decode(**changed: Tensor) -> Tensor:
    """A right call of decode_attention but for what is changed."""
    cache = {"k_cache": t(2, 3, 1, 4), "v_cache": t(2, 3, 1, 4), "lengths": torch.tensor([3, 1], dtype=torch.int32)}
    return ops.decode_attention(**({"q": t(2, 1, 2, 4)} | cache | changed))


def append(**changed: Any) -> None:
    """The same of append_kv_."""
    new = {name: t(2, 3 if "cache" in name else 1, 1, 4) for name in ("k_cache", "v_cache", "k", "v")}
    ops.append_kv_(**(new | {"lengths": IDS[:2].int()} | changed))


def varlen(**changed: Any) -> Tensor:
    """As `decode`, of attention_varlen."""
    right: dict[str, Any] = {name: t(2, 1, 4) for name in ("q", "k", "v")}
    right |= {name: torch.tensor([0, 2], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return ops.attention_varlen(**(right | {"max_seqlen_q": 2, "max_seqlen_k": 2} | changed))


# (call, how its message starts, what else it names)
WRONG: list[tuple[Callable[[], object], str, str]] = [
    (lambda: ops.softmax([1.0]), "softmax: x ", "list"),
    (lambda: ops.softmax(t(2, dtype=torch.int64)), "softmax: x ", "torch.int64"),
    (lambda: ops.softmax(t()), "softmax: x ", "()"),
    (lambda: ops.softmax(t(2, 0)), "softmax: x ", "(2, 0)"),
    (lambda: ops.layer_norm(t(2, 3), 1.0), "layer_norm: weight ", "float"),
    (lambda: ops.layer_norm(t(2, 3), t(3), t(3, dtype=torch.bool)), "layer_norm: bias ", "torch.bool"),
    (lambda: ops.layer_norm(t(2, 3), t(3, device=ELSEWHERE)), "layer_norm: weight ", "meta but x on cpu"),
    (lambda: ops.layer_norm(t()), "layer_norm: x ", "()"),
    (lambda: ops.layer_norm(t(2, 3), t(2)), "layer_norm: weight ", "(3,)"),
    (lambda: ops.layer_norm(t(2, 3), t(3), t(1)), "layer_norm: bias ", "(3,)"),
    (lambda: ops.layer_norm(t(2, 3), t(2, 3)), "layer_norm: weight ", "(2, 3)"),
    (lambda: ops.layer_norm(t(2, 3), t(3, dtype=HALF)), "layer_norm: weight ", "torch.float16"),
    (
        lambda: ops.layer_norm(t(2, 3, dtype=HALF), t(3), t(3, dtype=torch.float64)),
        "layer_norm: bias ",
        "torch.float64",
    ),
    (lambda: ops.rms_norm(t(2, 3, dtype=torch.int32)), "rms_norm: x ", "torch.int32"),
    (lambda: ops.rms_norm(t(2, 0)), "rms_norm: x ", "(2, 0)"),
    (lambda: ops.rms_norm(t(2, 3), t(4)), "rms_norm: weight ", "(3,)"),
    (lambda: ops.softmax(t(3), causal=True), "softmax: x ", "queries and keys"),
    (lambda: ops.softmax(t(3), mask=t(3)), "softmax: mask ", "torch.float32 on cpu"),
    (lambda: ops.softmax(t(3), mask=[True] * 3), "softmax: mask ", "list"),
    (lambda: ops.softmax(t(2, 3), mask=t(2, 1, dtype=torch.bool).T), "softmax: mask ", "(1, 2)"),
    (lambda: ops.softmax(t(3), mask=t(1, 3, dtype=torch.bool)), "softmax: mask ", "(1, 3)"),
    (lambda: ops.add_rms_norm(t(2, 3), t(3, 2)), "add_rms_norm: residual ", "(3, 2)"),
    (lambda: ops.add_rms_norm(t(2, 3), t(2, 3, dtype=HALF)), "add_rms_norm: residual ", "torch.float16"),
    (lambda: ops.add_layer_norm(t(2, 3), t(3)), "add_layer_norm: residual ", "(2, 3)"),
    (lambda: ops.add_layer_norm(t(2, 3), 0.0), "add_layer_norm: residual ", "float"),
    (lambda: ops.attention(t(1, 2, 3), *[t(1, 2, 1, 3)] * 2), "attention: q ", "(batch, length, heads, head_dim)"),
    (lambda: ops.attention(*[t(1, 2, 1, 3)] * 2, t(2, 3)), "attention: v ", "(2, 3)"),
    (lambda: ops.attention(*[t(1, 2, 1, 3)] * 2, "v"), "attention: v ", "str"),
    (lambda: ops.attention(t(1, 2, 1, 4), *[t(1, 2, 1, 4, dtype=HALF)] * 2), "attention: k ", "torch.float16 but q"),
    (lambda: ops.attention(t(1, 2, 1, 4), t(1, 2, 1, 4), t(1, 3, 1, 4)), "attention: k ", "(1, 3, 1, 4)"),
    (lambda: ops.attention(t(2, 2, 1, 4), *[t(1, 2, 1, 4)] * 2), "attention: k ", "but q (2, 2, 1, 4)"),
    (lambda: ops.attention(t(1, 2, 1, 4), *[t(1, 2, 1, 8)] * 2), "attention: k ", "(1, 2, 1, 8)"),
    (lambda: ops.attention(*[t(1, 2, 1, 0)] * 3), "attention: k ", "(1, 2, 1, 0)"),
    (lambda: ops.attention(t(1, 2, 3, 4), *[t(1, 2, 2, 4)] * 2), "attention: 3 query heads ", "2 key heads"),
    (lambda: ops.attention(t(1, 2, 3, 4), *[t(1, 2, 0, 4)] * 2), "attention: 3 query heads ", "0 key heads"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, scale=float("inf")), "attention: scale ", "inf"),
    (lambda: varlen(q=t(1, 2, 1, 4)), "attention_varlen: q ", "(all tokens, heads, head_dim)"),
    (lambda: varlen(cu_seqlens_q=t(2)), "attention_varlen: cu_seqlens_q ", "torch.float32"),
    (lambda: varlen(cu_seqlens_k=[0, 2]), "attention_varlen: cu_seqlens_k ", "list"),
    (lambda: varlen(cu_seqlens_k=torch.zeros(3, dtype=torch.int32)), "attention_varlen: cu_seqlens_q ", "2 entries"),
    (lambda: varlen(max_seqlen_k=-1), "attention_varlen: max_seqlen_k ", "is -1"),
    (lambda: varlen(max_seqlen_q=2.0), "attention_varlen: max_seqlen_q ", "is 2.0"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, window=2), "attention: window ", "it needs causal=True"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, causal=True, window=0), "attention: window ", "is 0"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, causal=True, window=1.5), "attention: window ", "is 1.5"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, softcap=-1.0), "attention: softcap ", "is -1.0"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, softcap=float("nan")), "attention: softcap ", "nan"),
    (lambda: ops.attention(*[t(1, 2, 1, 4)] * 3, scale=float("nan")), "attention: scale ", "nan"),
    (lambda: append(v=t(2, 1, 2, 4)), "append_kv: k ", "v (2, 1, 2, 4)"),
    (lambda: append(v_cache=t(2, 4, 1, 4)), "append_kv: k_cache ", "v_cache (2, 4, 1, 4)"),
    (lambda: append(k=t(2, 1, 1, 4, dtype=HALF), v=t(2, 1, 1, 4, dtype=HALF)), "append_kv: k ", "torch.float16"),
    (lambda: append(k=t(2, 1, 1, 3), v=t(2, 1, 1, 3)), "append_kv: k ", "(2, 1, 1, 3)"),
    (lambda: append(k=t(2, 1, 1, 4).requires_grad_()), "append_kv: k ", "gradient"),
    (lambda: append(lengths=None), "append_kv: lengths ", "None"),
    (lambda: append(lengths=IDS), "append_kv: lengths ", "torch.int64 on cpu"),
    (lambda: append(k=t(3, 1, 1, 4), v=t(3, 1, 1, 4), lengths=t(3).int()), "append_kv: k_cache ", "3 sequences"),
    (lambda: decode(lengths=IDS), "decode_attention: lengths ", "torch.int64 on cpu"),
    (lambda: decode(lengths=IDS[:1].int()), "decode_attention: lengths ", "(2,)"),
    (lambda: decode(k_cache=t(2, 3, 1, 4, dtype=HALF)), "decode_attention: k_cache ", "torch.float16 but q"),
    (lambda: decode(v_cache=t(2, 4, 1, 4)), "decode_attention: k_cache ", "v_cache (2, 4, 1, 4)"),
    (lambda: decode(q=t(3, 1, 2, 4), lengths=t(3).int()), "decode_attention: k_cache ", "block_table"),
    (lambda: decode(v_cache=t(2, 3, 1, 4).requires_grad_()), "decode_attention: v_cache ", "gradient"),
    (lambda: decode(block_table=t(2, 1)), "decode_attention: block_table ", "torch.float32 on cpu"),
    (lambda: decode(block_table=IDS.int()), "decode_attention: block_table ", "(2, max_pages)"),
    (
        lambda: decode(k_cache=t(0, 3, 1, 4), v_cache=t(0, 3, 1, 4), block_table=t(2, 1).int()),
        "decode_attention: k_cache ",
        "(0, 3, 1, 4)",
    ),
    (lambda: ops.gelu(t(2, dtype=torch.int64)), "gelu: x ", "torch.int64"),
    (lambda: ops.gelu(t(2), approximate="erf"), "gelu: approximate ", "'none' or 'tanh'"),
    (lambda: ops.bias_gelu(t(2), t(2, dtype=torch.int64)), "bias_gelu: bias ", "torch.int64"),
    (lambda: ops.bias_gelu(t(2), t(3)), "bias_gelu: bias ", "(2,)"),
    (lambda: ops.swiglu(t(2), t(3)), "swiglu: gate ", "up (3,)"),
    (lambda: ops.swiglu(t(2), t(2, dtype=HALF)), "swiglu: gate ", "torch.float16"),
    (lambda: ops.geglu(t(2), t(3)), "geglu: gate ", "up (3,)"),
    (lambda: ops.geglu(t(2), t(2), approximate="erf"), "geglu: approximate ", "'none' or 'tanh'"),
    (lambda: ops.rope(t(1, 2, 4), t(2, 2), t(2, 2)), "rope: x ", "(1, 2, 4)"),
    (lambda: ops.rope(t(1, 2, 1, 3), t(2, 1), t(2, 1)), "rope: x ", "head_dim even"),
    (lambda: ops.rope(t(1, 2, 1, 4), t(2, 4), t(2, 2)), "rope: cos ", "(2, 2)"),
    (lambda: ops.rope(t(1, 2, 1, 4), t(2, 2), t(3, 2)), "rope: sin ", "(2, 2)"),
    (lambda: ops.rope(t(3, 2, 1, 4), t(1, 2, 2), t(1, 2, 2)), "rope: cos ", "(3, 2, 2)"),
    (lambda: ops.rope(t(3, 2, 1, 4), t(3, 2, 2), t(2, 2)), "rope: sin ", "(3, 2, 2)"),
    (lambda: ops.cross_entropy(t(2, 4, dtype=torch.int64), IDS), "cross_entropy: logits ", "torch.int64"),
    (lambda: ops.cross_entropy(t(2, 2, 4), IDS), "cross_entropy: logits ", "(N, V)"),
    (lambda: ops.cross_entropy(t(3, 4), IDS), "cross_entropy: logits ", "targets (2,)"),
    (lambda: ops.cross_entropy(t(2, 4), IDS.int()), "cross_entropy: targets ", "torch.int32"),
    (lambda: ops.cross_entropy(t(2, 4), [0, 1]), "cross_entropy: targets ", "list"),
    (
        lambda: ops.cross_entropy(t(2, 4), IDS.to("meta")),
        "cross_entropy: targets ",
        "on meta; it must be a torch.int64 tensor on cpu",
    ),
    (lambda: ops.cross_entropy(t(2, 4), IDS, reduction="max"), "cross_entropy: reduction ", "'max'"),
    (lambda: ops.cross_entropy(t(2, 4), IDS, label_smoothing=1.5), "cross_entropy: label_smoothing ", "1.5"),
    (lambda: ops.cross_entropy(t(2, 4), IDS, z_loss=-1.0), "cross_entropy: z_loss ", "-1.0"),
    (lambda: ops.cross_entropy(t(2, 4), IDS, z_loss=float("inf")), "cross_entropy: z_loss ", "inf"),
    (lambda: ops.cross_entropy(t(2, 4), IDS, n_classes=5), "cross_entropy: n_classes ", "1 to 4"),
    (lambda: ops.cross_entropy(t(2, 4), IDS, n_classes=0), "cross_entropy: n_classes ", "1 to 4"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3), IDS.int()), "linear_cross_entropy: targets ", "torch.int32"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3), [0]), "linear_cross_entropy: targets ", "list"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 2), IDS), "linear_cross_entropy: x ", "(4, 2)"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3), IDS, t(3)), "linear_cross_entropy: bias ", "(4,)"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3, dtype=HALF), IDS), "linear_cross_entropy: weight ", "float16"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3), IDS, z_loss=-1.0), "linear_cross_entropy: z_loss ", "-1.0"),
    (lambda: ops.linear_cross_entropy(t(2, 3), t(4, 3), IDS[:1]), "linear_cross_entropy: x ", "(1,)"),
    (lambda: ops.fp8_linear(t(2, 16), t(24, 16)), "fp8_linear: weight ", "(24, 16)"),
    (lambda: ops.fp8_mlp(t(2, 16), t(24, 16), None, t(16, 24), None), "fp8_mlp: up ", "(24, 16)"),
    (lambda: ops.fp8_mlp(t(2, 16), t(48, 16), None, t(16, 16), None), "fp8_mlp: up ", "(48, 16)"),
    (lambda: ops.fp8_mlp(t(2, 16), t(32, 16), t(16), t(16, 16), None), "fp8_mlp: up_bias ", "(16,)"),
    (lambda: ops.fp8_mlp(t(2, 16), t(32, 16), None, t(16, 16), t(32)), "fp8_mlp: down_bias ", "(32,)"),
    (
        lambda: ops.fp8_mlp(t(2, 16), t(16, 16), None, t(16, 16), None, activation="relu"),
        "fp8_mlp: activation ",
        "'relu'",
    ),
    (lambda: ops.fp8_linear_cross_entropy(t(2, 16), t(4, 16), [0]), "fp8_linear_cross_entropy: targets ", "list"),
    (lambda: ops.fp8_linear_cross_entropy(t(2, 24), t(4, 24), IDS), "fp8_linear_cross_entropy: weight ", "(4, 24)"),
    (
        lambda: ops.fp8_linear_cross_entropy(t(2, 16), t(4, 16), IDS, reduction="none"),
        "fp8_linear_cross_entropy: reduction ",
        "'none'",
    ),
    (lambda: ops.activation_linear(t(2, 3), t(4, 3), activation="relu"), "activation_linear: activation ", "'relu'"),
    (lambda: ops.activation_linear(t(2, 3), t(4, 2)), "activation_linear: x ", "(4, 2)"),
    (lambda: ops.activation_linear(t(2, 3), t(4, 3), up=t(2, 4)), "activation_linear: x ", "(2, 4)"),
    (lambda: ops.activation_linear(t(2, 3), t(4, 3), x_bias=t(4)), "activation_linear: x_bias ", "(4,)"),
    (lambda: ops.embedding(t(4), IDS), "embedding: weight ", "(V, D)"),
    (lambda: ops.embedding(IDS, IDS), "embedding: weight ", "torch.int64"),
    (lambda: ops.embedding(t(4, 2), IDS.int()), "embedding: tokens ", "torch.int32 on cpu"),
    (lambda: ops.embedding(t(4, 2), [0]), "embedding: tokens ", "list"),
    (lambda: ops.embedding(t(4, 2), IDS, padding_idx=4), "embedding: padding_idx ", "-4 to 3"),
    (lambda: ops.adamw_(*[t(2)] * 3, t(3), step=1, learning_rate=0.1), "adamw: exp_avg_sqs ", "(3,)"),
    (lambda: ops.adamw_(*[[t(2), t(3)]] * 3, [t(2)], step=1, learning_rate=0.1), "adamw: exp_avg_sqs ", "1 tensors"),
    (lambda: ops.adamw_([], [], [], [], step=1, learning_rate=0.1), "adamw: parameters ", "0 tensors"),
    (
        lambda: ops.adamw_(*[[t(2), t(3)]] * 4, [t(2), t(3, dtype=HALF)], step=1, learning_rate=0.1),
        "adamw: copies ",
        "torch.float16",
    ),
    (
        lambda: ops.adamw_(*[t(2)] * 3, t(2, dtype=HALF), step=1, learning_rate=0.1),
        "adamw: exp_avg_sqs ",
        "torch.float16",
    ),
    (lambda: ops.adamw_([t(2), 1.0], *[[t(2)] * 2] * 3, step=1, learning_rate=0.1), "adamw: parameters ", "float"),
    (lambda: ops.adamw_(*[t(2)] * 4, step=1, learning_rate=0.1, grad_scale=t(2)), "adamw: grad_scale ", "(2,)"),
    (lambda: ops.adamw_(*[t(2)] * 4, step=0, learning_rate=0.1), "adamw: step is 0", "number 1"),
    (lambda: ops.explain("nothing"), "unknown op 'nothing'", "cross_entropy"),
]


@pytest.mark.parametrize(("call", "start", "named"), WRONG, ids=[f"{s.strip()}-{n}" for _, s, n in WRONG])
def test_refuses(call: Callable[[], object], start: str, named: str) -> None:
    """A wrong argument is an InputError of one line that names the op, the argument and the value."""
    with pytest.raises(InputError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(start) and named in message and "\n" not in message


def test_the_table_above_covers_every_check() -> None:
    raised_at = set()
    for call, _, _ in WRONG:
        try:
            call()
        except InputError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raised_at.add((frame.filename, frame.lineno))
    for path in (arguments.__file__, checks.__file__):
        raises = [n for n in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))) if isinstance(n, ast.Raise)]
        lines = {line for file, line in raised_at if file == path}
        assert raises and [n.lineno for n in raises if not lines & {*range(n.lineno, (n.end_lineno or 0) + 1)}] == []


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SUPPORTED = [
    pytest.param(op, name, dtype, id=f"{op}-{name}-{str(dtype).removeprefix('torch.')}")
    for op in BACKENDS
    # Whose results are of another shape, or none, or have no gradient.
    if op
    not in (
        "adamw",
        "embedding",
        "fp8_linear",
        "fp8_mlp",
        "fp8_linear_cross_entropy",
        "activation_linear",
        "mlp",
        "linear_cross_entropy",
        "decode_attention",
        "append_kv",
    )
    for name, dtypes in [*((row.name, row.dtypes) for row in BACKENDS[op]), ("reference", DTYPES)]
    for dtype in DTYPES
    # Triton's CPU interpreter computes bfloat16 wrongly.
    if dtype in dtypes and (name != "triton" or dtype is not torch.bfloat16 or torch.cuda.is_available())
]


@pytest.mark.parametrize(("op", "backend", "dtype"), SUPPORTED)
def test_results_have_the_inputs_dtype_and_shape(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """Every number of dimensions and an empty one; float32 parameters beside 16-bit values; gradients as leaves."""
    if backend == "triton":
        pytest.importorskip("triton")

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def starts(*rows: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    parameter = torch.promote_types(dtype, torch.float32) if dtype is not torch.float64 else dtype
    for shape in [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6)]:
        if len(shape) != {"attention": 4, "rope": 4, "attention_varlen": 3}.get(op, len(shape)):
            continue
        leaves = {
            "softmax": lambda s: [leaf(*s)],
            "gelu": lambda s: [leaf(*s)],
            "swiglu": lambda s: [leaf(*s), leaf(*s)],
            "geglu": lambda s: [leaf(*s), leaf(*s)],
            "add_layer_norm": lambda s: [leaf(*s), leaf(*s), leaf(6, dtype=parameter), leaf(6, dtype=parameter)],
            "add_rms_norm": lambda s: [leaf(*s), leaf(*s), leaf(6, dtype=parameter)],
            "layer_norm": lambda s: [leaf(*s), leaf(6, dtype=parameter), leaf(6, dtype=parameter)],
            "rms_norm": lambda s: [leaf(*s), leaf(6, dtype=parameter)],
            "bias_gelu": lambda s: [leaf(*s), leaf(6, dtype=parameter)],
            "attention": lambda s: [leaf(2, 3, 4, 6), leaf(2, 5, 2, 6), leaf(2, 5, 2, 6)],
            "attention_varlen": lambda s: [leaf(5, 4, 6), leaf(7, 2, 6), leaf(7, 2, 6)],
            "linear": lambda s: [leaf(*s), leaf(6, 6), leaf(6, dtype=parameter)],
            "rope": lambda s: [leaf(*s)],
            "cross_entropy": lambda s: [leaf(4, 6)],
        }[op](shape)
        extra = {
            "cross_entropy": [torch.tensor([0, 5, -100, 2], device=device)],
            "attention_varlen": [starts(0, 2, 5), starts(0, 7, 7), 3, 7],
            "rope": [torch.randn(shape[1] if len(shape) == 4 else 1, 3, dtype=parameter, device=device)] * 2,
        }.get(op, [])
        outs = outputs(getattr(ops, op)(*leaves, *extra, backend=backend))
        for out in outs:
            assert out.shape == (() if op == "cross_entropy" else leaves[0].shape)
            assert out.dtype == (parameter if op == "cross_entropy" else dtype)
        for leaf_, grad in zip(leaves, torch.autograd.grad([out.sum() for out in outs], leaves), strict=True):
            assert (grad.shape, grad.dtype) == (leaf_.shape, leaf_.dtype)


def test_a_frozen_layer_keeps_and_gets_what_is_asked_for(device: str) -> None:
    """As F.linear does: no gradient of a frozen weight is made, and its input is not kept for one."""
    x, weight, bias = torch.randn(5, 6, device=device), torch.randn(4, 6, device=device), torch.randn(4, device=device)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]:
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, weight, bias), needs, strict=True)]
        out = ops.linear(*leaves, backend="triton")
        kept: Any = out.grad_fn
        assert (kept.saved_tensors[0] is not None) == needs[1]
        out.sum().backward()
        for leaf, n in zip(leaves, needs, strict=True):
            assert (leaf.grad is not None) == n
        if needs[2]:
            torch.testing.assert_close(leaves[2].grad, torch.full_like(bias, 5.0))
