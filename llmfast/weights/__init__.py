"""Weights on disk: checkpoints of runs, and models in Hugging Face's format."""

from .checkpoint import Checkpoint, latest, load, save, saved_steps
from .pretrained import PretrainedGPT, Source, family_of, from_pretrained, save_pretrained

__all__ = [
    "Checkpoint",
    "PretrainedGPT",
    "Source",
    "family_of",
    "from_pretrained",
    "latest",
    "load",
    "save",
    "save_pretrained",
    "saved_steps",
]
