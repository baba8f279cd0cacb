"""How good a language model is, and what it has to beat."""

from llmfast.evals.ladder import Rung, ladder, witten_bell
from llmfast.evals.loss import bits_per_byte

__all__ = ["Rung", "bits_per_byte", "ladder", "witten_bell"]
