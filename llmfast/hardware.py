"""What the machine is: the device, its published peaks, and the versions of what runs on it."""

import functools
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100 = "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"
_H200 = "https://resources.nvidia.com/en-us-gpu-resources/hpc-datasheet-sc23"
_A10 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"
_L4 = "https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet"
_L40S = "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"

# Name as CUDA gives it -> (dense bf16 FLOP/s with fp32 accumulation, memory bytes/s, source). Data sheets that give
# only the rate with 2:4 sparsity are halved.
PEAKS: dict[str, tuple[float, float, str]] = {
    "NVIDIA H200": (989e12, 4.8e12, _H200),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12, _H100),
    "NVIDIA H100 PCIe": (756e12, 2.0e12, _H100),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12, _A100),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12, _A100),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12, _A100),
    "NVIDIA A100-PCIE-40GB": (312e12, 1.555e12, _A100),
    "NVIDIA A10": (125e12, 0.600e12, _A10),
    "NVIDIA L4": (121e12, 0.300e12, _L4),
    "NVIDIA L40S": (362e12, 0.864e12, _L40S),
    "NVIDIA GeForce RTX 4090": (165.2e12, 1.008e12, _ADA),
    "NVIDIA GeForce RTX 3090": (71e12, 0.936e12, _AMPERE),
}


@dataclass(frozen=True)
class Device:
    """A device; a field that is not known is None.

    `sms` counts multiprocessors, `memory_bytes` all memory, whoever uses it; `peak_flops` is dense bf16 FLOP/s and
    `peak_bytes_per_s` the memory's, both published.
    """

    type: str
    name: str
    capability: tuple[int, int] | None
    sms: int | None
    memory_bytes: int | None
    peak_flops: float | None
    peak_bytes_per_s: float | None


@functools.cache
def several_gpus() -> bool:
    """Whether a tensor on a GPU may lie on another than the current one."""
    return torch.cuda.device_count() > 1


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device(name: str | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1"), or the default one. Raises InputError if it is not here."""
    if name is None:
        return default_device()
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"unknown device {name!r}; choose cpu, cuda or cuda:<number>")
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        have = f"PyTorch {torch.__version__} sees {count} CUDA device{'' if count == 1 else 's'}"
        raise InputError(f"device {name!r} is not available, {have}; use cpu or another number")
    return torch.device("cuda", index)


@functools.cache
def describe(device: torch.device | None = None) -> Device:
    """The properties of `device`, of the default one if None."""
    device = default_device() if device is None else device
    if device.type != "cuda":
        name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return Device(device.type, f"{name}, {os.cpu_count()} cores", None, None, _host_memory(), None, None)
    properties = torch.cuda.get_device_properties(device)
    flops, bytes_per_s, _ = PEAKS.get(properties.name, (None, None, None))
    return Device(
        type="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor),
        sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        peak_flops=flops,
        peak_bytes_per_s=bytes_per_s,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """What models compute in on `device`: bfloat16 where there is hardware for it, else float32.

    That is a GPU of capability 8.0 or newer, or a CPU with bfloat16 products (AVX-512 BF16, AMX, Arm's BF16).
    """
    if device.type == "cuda":
        capability = describe(device).capability
        return torch.bfloat16 if capability is not None and capability >= (8, 0) else torch.float32
    has = _cpu_capabilities()
    return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def _cpu_capabilities() -> Mapping[str, Any]:
    """What PyTorch found of the CPU's instructions; nothing before PyTorch 2.12, which cannot be asked."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and not every system these names
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory or the host's was used up; PyTorch has a class for some of these errors only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; None where a part is not installed or not known."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _package_version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """The NVIDIA kernel driver's, which Linux gives as a file; None elsewhere."""
    file = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", file.read_text()) if file.exists() else None
    return match[0] if match else None
