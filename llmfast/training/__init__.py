"""Training: the loop, its configuration, optimiser, metrics and progress."""

from .config import TrainConfig
from .loop import Report, Result, train
from .metrics import Evaluation, Step

__all__ = ["Evaluation", "Report", "Result", "Step", "TrainConfig", "train"]
