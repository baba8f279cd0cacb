"""Triton's launcher for NVIDIA without a GPU: what a compiled kernel would be launched with is noted."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def _encode(address: int, *args: Any) -> tuple[Any, ...]:
    """In place of cuTensorMapEncodeTiled: all that it is given."""
    return address, *[tuple(a) if isinstance(a, list) else a for a in args]


# Of a driver. 3.7 gave the function another name.
UTILS = SimpleNamespace(fill_tma_descriptor=_encode, fill_tma_descriptor_tiled=_encode)


def descriptors_in(signature: dict[str, Any]) -> list[dict[str, Any]]:
    """`tensordesc_meta` of a kernel's metadata: an encoding that tells its arguments apart."""
    places = [i for i, kind in enumerate(signature.values()) if isinstance(kind, str) and kind.startswith("tensordesc")]
    alike = {"elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}
    return [{"swizzle": place, **alike} for place in places]


def launcher(signature: dict[str, Any], note: Callable[[tuple[Any, ...], tuple[Any, ...]], object]) -> Any:
    """Encodes descriptors as Triton does, and gives `note` the kernel's arguments, and before them all others."""
    from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc

    def launch(*args: Any) -> None:
        if isinstance(args[-1], tuple | list):  # from 3.7 on
            note(args[:-1], tuple(args[-1]))
        else:
            note(args[:13], args[13:])

    run: Any = object.__new__(CudaLauncher)
    run.global_scratch_size = run.global_scratch_align = run.profile_scratch_size = run.profile_scratch_align = 0
    run.launch_cooperative_grid = run.launch_pdl = run.gsan_enabled = False
    run.arg_annotations = run.kernel_signature = None
    run.launch = wrap_handle_tensordesc(launch, signature, descriptors_in(signature))
    return run
