"""The backend `cuda`: CUDA C++ on NVIDIA GPUs of compute capability 8.0 and newer."""

from . import library
from .launch import *  # noqa: F403

library.load("cuda")
