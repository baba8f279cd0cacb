"""Launching a kernel that is compiled already, in a third of the host time that `kernel[grid](...)` takes or less.

Triton finds the compiled kernel of a call by binding its arguments, asking of each what it specialises on, and putting
that and the options into a string; then it builds metadata for hooks that nobody has set. Here what is compiled is kept
by device and by what Triton itself says of all arguments at once. A first call goes through Triton, and so does every
call in the CPU interpreter, where something else runs kernels (llmfast/testing/offline.py), for profilers' hooks and
debugging options, and in a version of Triton that is not known here. One check of Triton's is left to the first call:
that no global that a kernel reads has changed.

Of a TMA descriptor Triton's launcher asks the type anew and encodes it anew (cuTensorMapEncodeTiled), each time it is
launched with: a `Descriptor` knows its type, and what it is encoded as is kept with the compiled kernel.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton._C import libtriton
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Read for each version: JITFunction.run, CompiledKernel, native_specialize_impl, the launcher of NVIDIA's driver and
# what wraps it for descriptors.
KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))


def _tritons_run() -> Any:
    """JITFunction.run, unless something else, to which every launch must go, has taken its place before."""
    code = getattr(JITFunction.run, "__code__", None)
    replaced = code is None or code.co_filename != JITFunction.__init__.__code__.co_filename
    return JITFunction.run if KNOWN and not replaced else None


_RUN = _tritons_run()
_specialise: Any = getattr(libtriton, "native_specialize_impl", None)
_ENTER, _EXIT = (getattr(knobs.runtime, f"launch_{end}_hook", None) for end in ("enter", "exit"))


class Descriptor:
    """A TMA descriptor of Triton's that is launched with often, and what it is encoded as.

    Who keeps one need not keep the tensor's memory: of a descriptor's `base` Triton reads the address and the dtype.
    """

    def __init__(self, tritons: Any) -> None:
        self.tritons = tritons
        self._encoded: dict[Callable[[Any], list[Any]], list[Any]] = {}

    @functools.cached_property
    def kind(self) -> Any:
        """All that a kernel is compiled for, as Triton says it of an argument."""
        return _specialise(BaseBackend, (self.tritons,), False, True, True)

    def encoded(self, encode: Callable[[Any], list[Any]]) -> list[Any]:
        """By what encodes one argument of a compiled kernel, which has its own swizzle."""
        found = self._encoded.get(encode)
        if found is None:
            found = self._encoded[encode] = encode(self.tritons)
        return found


class Variant:
    """A kernel with its constexprs and Triton's options, `constants`: made once, launched often.

    `variant.launch(grid, *args)` is `kernel[grid](*args, **constants)`, where args are all that is no constexpr; with
    `descriptors`, the kernel takes these before them. With EARLY, which `await_previous` takes, it is launched while
    the kernel before still runs.
    """

    __slots__ = ("_compiled", "constants", "kernel")

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel = kernel
        self.constants = constants | ({"launch_pdl": constants["EARLY"]} if "EARLY" in constants else {})
        self._compiled = _Compiled(None)

    def launch(self, grid: tuple[int, ...], *args: Any, descriptors: tuple[Descriptor, ...] = ()) -> None:
        kernel, compiled = self.kernel, self._compiled
        if type(kernel).run is not _RUN or _watched(kernel):
            kernel[grid](*[d.tritons for d in descriptors], *args, **self.constants)
            return
        active = driver.active
        if compiled.driver is not active:
            compiled = self._compiled = _Compiled(active)
        device = active.get_current_device()
        # All that Triton can specialise on, also where the kernel asks it not to: that tells more apart than it need.
        key: tuple[Any, ...] = device, _specialise(BaseBackend, args, False, True, True)
        if descriptors:
            key += tuple([d.kind for d in descriptors])
        found = compiled.get(key)
        if found is None:
            launched = kernel[grid](*[d.tritons for d in descriptors], *args, **self.constants)
            found = self._relaunch(launched, len(args), len(descriptors))
            if found is not None:
                compiled[key] = found
            return
        run, encoders, function, metadata, fillers, _ = found
        x, y, z = (*grid, 1, 1)[:3]
        if descriptors:
            args = *[part for d, e in zip(descriptors, encoders, strict=True) for part in d.encoded(e)], *args
        # Neither hooks nor metadata for them.
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *fillers)

    def _relaunch(self, compiled: Any, n_args: int, n_descriptors: int) -> tuple[Any, ...] | None:
        """What launches `compiled` again: its launcher, what encodes each descriptor for that, the first arguments of
        it, what stands for constexprs, which it does not read, and `compiled`, lest it be unloaded. None where that or
        a key does not suffice."""
        constexprs = [p.is_constexpr for p in self.kernel.params]
        n_args += n_descriptors
        fillers = (None,) * (len(constexprs) - n_args)
        if type(compiled) is not CompiledKernel or constexprs != [False] * n_args + [True] * len(fillers):
            return None
        if compiled.metadata.target.backend != "cuda":  # AMD's specialises on more
            return None
        run, encoders = _encoding(compiled) if n_descriptors else (compiled.run, [])
        if len(encoders) != n_descriptors:
            return None
        return run, encoders, compiled.function, compiled.packed_metadata, fillers, compiled


def _encoding(compiled: Any) -> tuple[Any, list[Callable[[Any], list[Any]]]]:
    """A launcher that takes descriptors as they are encoded, and what encodes each; where the kernel's own launcher is
    none that is known, this and nothing."""
    from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg

    run = copy.copy(compiled.run)
    if not isinstance(run, CudaLauncher):
        return run, []
    run.launch = inspect.getclosurevars(run.launch).nonlocals["launcher"]
    unread = (None,) * (make_tensordesc_arg.__code__.co_argcount - 2)  # from Triton 3.8 on

    def encode(meta: Any, descriptor: Any) -> list[Any]:
        return make_tensordesc_arg(descriptor, meta, *unread)

    metas = compiled.metadata.tensordesc_meta or ()  # none for a GPU without TMA
    return run, [functools.partial(encode, meta) for meta in metas]


class _Compiled(dict):
    """What a variant has compiled with one of Triton's drivers."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, descriptors: tuple[Descriptor, ...] = (), **constants: Any
) -> None:  # fmt: skip
    """Launch the variant of `kernel` with these constants, which the kernel keeps."""
    values = constants.values()
    key = (*constants, *values, *map(type, values))  # types, because True equals 1
    variants = kernel.__dict__.setdefault("llmfast_variants", {})
    variant = variants.get(key) or variants.setdefault(key, Variant(kernel, **constants))
    variant.launch(grid, *args, descriptors=descriptors)


def _watched(kernel: Any) -> bool:
    """Whether somebody wants to see launches, or has asked for kernels of another kind."""
    runtime = knobs.runtime
    return bool(
        runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or _ENTER.calls
        or _EXIT.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )
