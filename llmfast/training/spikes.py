"""Telling gradient norms that stand out from those before them, on the device, so that the host need not wait."""

import torch
from torch import Tensor

DECAY = 0.98  # of the running mean and variance: some 50 updates count
FIRST = 50  # updates that none is judged by


class SpikeDetector:
    """Running mean and variance of the gradient norms of updates that were made, exponentially weighted."""

    def __init__(self, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.seen = torch.zeros(3, device=device)  # number of updates, mean, variance

    def judge(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Whether the update of this norm is to be made: it is finite, and no more than `threshold` standard deviations
        above the mean. Only then does it count for those to come."""
        count, mean, variance = self.seen
        stands_out = (count >= FIRST) & (norm > mean + self.threshold * variance.sqrt())
        made = finite & ~stands_out
        share = (1.0 / (count + 1.0)).clamp(min=1.0 - DECAY)  # an average until there are enough
        off = norm - mean
        after = torch.stack((count + 1.0, mean + share * off, (1.0 - share) * (variance + share * off * off)))
        self.seen = torch.where(made, after, self.seen)
        return made
