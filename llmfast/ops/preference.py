"""Which backend was measured fastest on a GPU, by op and row length; made by benchmarks/prefer.py."""

# Op -> (longest row, backend), in order of length; the last one holds for longer rows too.
PREFERRED: dict[str, tuple[tuple[int, str], ...]] = {
    "add_layer_norm": ((32768, "triton"),),
    "add_rms_norm": ((32768, "triton"),),
    "bias_gelu": ((8192, "cuda"),),
    "cross_entropy": ((131072, "cuda"),),
    "gelu": ((4096, "cuda"),),
    "layer_norm": ((8192, "triton"), (131072, "cuda")),
    "rms_norm": ((8192, "triton"), (131072, "cuda")),
    "softmax": ((1024, "triton"), (131072, "cuda")),
}
