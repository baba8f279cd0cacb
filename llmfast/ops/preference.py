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

# Op -> backend for arguments of so few elements that launching takes longer than running.
SMALL = 2**20
PREFERRED_WHERE_SMALL: dict[str, str] = {
    "add_layer_norm": "cuda",
    "add_rms_norm": "cuda",
    "bias_gelu": "cuda",
    "cross_entropy": "cuda",
    "gelu": "cuda",
    "layer_norm": "cuda",
    "rms_norm": "cuda",
    "softmax": "cuda",
}
