"""The backend `cpp`: C++ on the CPU, float32 and bfloat16."""

from . import library
from .launch import *  # noqa: F403
from .layers import *  # noqa: F403

library.load("cpu")
