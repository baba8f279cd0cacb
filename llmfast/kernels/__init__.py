"""Triton kernels. In a checkout their sources are the top-level kernels/; a wheel holds them here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
