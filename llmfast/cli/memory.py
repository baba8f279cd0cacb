"""What the user reads when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import hardware
from ..errors import InputError


@contextmanager
def explaining_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Running out of memory inside becomes an InputError that names the device and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise InputError(f"{hardware.describe(device).name} ran out of memory; {remedy}") from error
