"""Which backend was measured fastest on a GPU, by op and row length; made by benchmarks/prefer.py."""

# Op -> (longest row, backend), in order of length; the last one holds for longer rows too.
PREFERRED: dict[str, tuple[tuple[int, str], ...]] = {
    "layer_norm": ((131072, "cuda"),),
    "softmax": ((8192, "triton"), (131072, "cuda")),
}
