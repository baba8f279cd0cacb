"""Checkpoints on disk."""

from .checkpoint import Checkpoint, latest, load, save

__all__ = ["Checkpoint", "latest", "load", "save"]
