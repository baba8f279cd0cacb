"""Run Gluon kernels in Python, on NumPy arrays: Triton's interpreter does not know Gluon.

`interpreted(launcher)` is a copy of a launcher in which every jitted function that it comes to is the Python function
that it was written as, on top of stand-ins for Gluon, Triton and Hopper's instructions. Partitions are threads, and
what is asynchronous happens at once or as late as it may, at the wait for it, by chance: shared memory that is freed or
read too early then gives wrong numbers. Kernels all of whose threads wait raise Deadlock. Not modelled: layouts,
registers, the rounding of other types than float16 and float32, the order in which memory is seen, and speed.
"""

from .interpreter import interpreted
from .machine import Deadlock

__all__ = ["Deadlock", "interpreted"]
