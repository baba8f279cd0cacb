"""Time on the device, with a cold cache, and the ceilings of this very device that times are compared with."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# Larger than any GPU's L2 cache (an H200's is 60 MB): writing it evicts everything else.
_FLUSH_BYTES = 256 * 2**20
# How long the GPU is kept waiting before each timed call, about 1 ms: while it waits the host queues all the call's
# kernels, so that their times are measured and not the host's (autograd alone takes 0.2 ms to launch a backward pass).
_WAIT_CYCLES = 2_000_000


class Ceilings(NamedTuple):
    """Measured here and now: bytes/s of a large copy (read and write counted), FLOP/s of a large matrix product."""

    bytes_per_s: float
    flops: float


def milliseconds(function: Callable[[], object], device: torch.device, budget_ms: float = 150.0) -> float:
    """Median time of `function` in milliseconds: CUDA events around each call after an L2 flush, or the host's clock.

    The number of repeats, 5 to 200, is what fits into `budget_ms`; the first calls are not counted.
    """
    if device.type != "cuda":
        return _host_milliseconds(function, budget_ms)
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    for _ in range(3):
        function()
    estimate = max(_event_milliseconds(function, flush, 3), 1e-3)
    return _event_milliseconds(function, flush, min(200, max(5, int(budget_ms / estimate))))


def _event_milliseconds(function: Callable[[], object], flush: torch.Tensor, repeats: int) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(_WAIT_CYCLES)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _host_milliseconds(function: Callable[[], object], budget_ms: float) -> float:
    # glibc maps and unmaps a block as large as any that it has seen freed, up to 32 MB, on every call
    # (https://man7.org/linux/man-pages/man3/mallopt.3.html): page faults, not the function, would be timed.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The copy bandwidth and the matrix-product rate of this device, on random data (zeros run faster)."""
    n_bytes = 2**31 if device.type == "cuda" else 2**27
    source = torch.randint(0, 2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device)
    return Ceilings(2 * n_bytes / copy_ms * 1e3, matrix_product_flops(device, dtype))


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, measured in less than a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, device) * 1e3
