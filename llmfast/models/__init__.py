"""One configurable decoder and its presets."""

from .cache import DeviceKVCache, KVCache
from .config import Config
from .gpt import GPT
from .presets import PRESETS, preset
from .rope import RopeScaling

__all__ = ["GPT", "PRESETS", "Config", "DeviceKVCache", "KVCache", "RopeScaling", "preset"]
