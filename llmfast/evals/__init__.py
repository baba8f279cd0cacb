"""How good a language model is, and what it has to beat."""

from .ladder import Rung, ladder, witten_bell
from .loss import bits_per_byte
from .position import loss_by_position

__all__ = ["Rung", "bits_per_byte", "ladder", "loss_by_position", "witten_bell"]
