"""Which backend was measured fastest on a GPU, by op, direction and row length: benchmarks/prefer.py wrote it."""

from typing import Literal

# Op -> direction -> (longest row, backend), in order of length; the last one holds for longer rows too.
PREFERRED: dict[str, dict[Literal["fwd", "bwd"], tuple[tuple[int, str], ...]]] = {
    "add_layer_norm": {
        "fwd": ((32768, "triton"),),
        "bwd": ((32768, "triton"),),
    },
    "add_rms_norm": {
        "fwd": ((32768, "triton"),),
        "bwd": ((32768, "triton"),),
    },
    "bias_gelu": {
        "fwd": ((8192, "cuda"),),
        "bwd": ((8192, "cuda"),),
    },
    "cross_entropy": {
        "fwd": ((4096, "cuda"), (131072, "triton")),
        "bwd": ((131072, "cuda"),),
    },
    "gelu": {
        "fwd": ((4096, "triton"),),
        "bwd": ((4096, "cuda"),),
    },
    "layer_norm": {
        "fwd": ((32768, "triton"), (131072, "cuda")),
        "bwd": ((8192, "triton"), (131072, "cuda")),
    },
    "rms_norm": {
        "fwd": ((32768, "triton"), (131072, "cuda")),
        "bwd": ((8192, "triton"), (131072, "cuda")),
    },
    "softmax": {
        "fwd": ((131072, "cuda"),),
        "bwd": ((8192, "triton"), (131072, "cuda")),
    },
}

# Op -> direction -> backend for arguments of so few elements that launching takes longer than running.
SMALL = 2**20
PREFERRED_WHERE_SMALL: dict[str, dict[Literal["fwd", "bwd"], str]] = {
    "add_layer_norm": {"fwd": "triton", "bwd": "cuda"},
    "add_rms_norm": {"fwd": "triton", "bwd": "cuda"},
    "bias_gelu": {"fwd": "cuda", "bwd": "cuda"},
    "cross_entropy": {"fwd": "cuda", "bwd": "cuda"},
    "gelu": {"fwd": "cuda", "bwd": "cuda"},
    "layer_norm": {"fwd": "cuda", "bwd": "cuda"},
    "rms_norm": {"fwd": "cuda", "bwd": "cuda"},
    "softmax": {"fwd": "cuda", "bwd": "cuda"},
}
