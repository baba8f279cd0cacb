"""Text generation."""

from .generate import generate
from .sampling import sample

__all__ = ["generate", "sample"]
