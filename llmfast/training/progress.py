"""Training progress for people: a live line on a terminal, a plain line every ten seconds elsewhere."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from .metrics import Evaluation, Step

SECONDS_A_LINE = 10.0


class TrainingConsole(Console):
    """A console whose reader may go away, as in `llmfast train | head`."""

    def on_broken_pipe(self) -> None:
        """As at SIGTERM: the step ends, and is saved. rich would exit at once."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes there at exit
        signal.raise_signal(signal.SIGTERM)


class Progress:
    """A `Report` that prints to `console`; use it in a `with` block.

    The share of the device's peak is flops_per_token * tokens/s / peak_flops, left out where the peak is not known.
    """

    def __init__(self, console: Console, max_steps: int, flops_per_token: float, peak_flops: float | None) -> None:
        self.console, self.max_steps = console, max_steps
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.printed_at = -float("inf")
        self.begun: tuple[float, float] | None = None  # (time, progress) of the first report: a resume starts late
        self.val_bpb: float | None = None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def step(self, step: Step, progress: float) -> None:
        now = time.perf_counter()
        self.begun = self.begun or (now, progress)
        line = self._line(step, progress, self._seconds_left(now, progress))
        if self.live:
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self.printed_at >= SECONDS_A_LINE or progress >= 1.0:
            self.printed_at = now
            self._print(line)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.val_bpb = evaluation.val_bpb
        self._print(
            f"step {evaluation.step}  validation {evaluation.val_bpb:.4f} bits/byte  {clock(evaluation.seconds)}"
        )

    def message(self, text: str) -> None:
        self._print(text)

    def _line(self, step: Step, progress: float, left: float | None) -> str:
        parts = [
            f"step {step.step}/{self.max_steps} {progress:.0%}",
            f"loss {step.loss:.3f}",
            f"{step.tok_s:,.0f} tok/s",
        ]
        if self.peak_flops:
            parts.append(f"{self.flops_per_token * step.tok_s / self.peak_flops:.1%} of peak")
        if self.live and self.val_bpb is not None:
            parts.append(f"val {self.val_bpb:.4f}")
        if left is not None:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def _seconds_left(self, now: float, progress: float) -> float | None:
        assert self.begun is not None
        started, at = self.begun
        return (now - started) * (1.0 - progress) / (progress - at) if progress > at else None

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a log on a disk that is full; the metrics are reported on their own
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as [h:]mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
