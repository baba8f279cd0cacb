"""Where a run's records go: always to metrics.jsonl, and to TensorBoard if asked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import InputError
from .metrics import Evaluation, Step

SCALARS = {Step: ("loss", "lr", "grad_norm", "tok_s"), Evaluation: ("val_bpb",)}


class Tracker(Protocol):
    """Takes records in the order of their steps; `MetricsFile` is one. An OSError is reported and training goes on."""

    def rewind(self, step: int, on_skip: Callable[[str], None]) -> None:
        """Called before the first record: what is kept of steps later than `step` is to go, they are done again."""
        ...

    def append(self, records: Sequence[Step | Evaluation]) -> None: ...


class TensorBoard:
    """Scalars by step, under their names in metrics.jsonl, in a folder that `tensorboard --logdir` shows."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"TensorBoard's package is missing ({error}); pip install tensorboard") from None
        self.folder, self._open = folder, SummaryWriter

    def rewind(self, step: int, on_skip: Callable[[str], None]) -> None:
        self.writer = self._open(str(self.folder), purge_step=step + 1)

    def append(self, records: Sequence[Step | Evaluation]) -> None:
        for record in records:
            for name in SCALARS[type(record)]:
                self.writer.add_scalar(name, getattr(record, name), record.step)
        self.writer.flush()
