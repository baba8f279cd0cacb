"""Text generation."""

from .decoding import Decoder
from .generate import generate
from .sampling import sample

__all__ = ["Decoder", "generate", "sample"]
