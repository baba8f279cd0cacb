"""Folders of safetensors: what they hold is known, and checked, before any tensor is in memory."""

import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..files import parse_json
from .fields import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9  # as transformers cuts them


@dataclass(frozen=True)
class Entry:
    """A tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Entry] = {}
        if (folder / SINGLE).is_file():
            if (folder / INDEX).is_file() and set(_weight_map(folder / INDEX).values()) != {SINGLE}:
                raise InputError(f"{folder}: has {SINGLE}, and {INDEX} that lists other files; remove one of them")
            self._add(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._add_shards(folder)
        elif any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise InputError(
                f"{folder}: holds pickled weights, which can run code when they are read; where you trust them, "
                "convert with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        else:
            raise InputError(f"{folder}: has no {SINGLE} and no {INDEX}; give a folder with weights")

    def read(self, name: str) -> Tensor:
        """The tensor, as it is stored."""
        with _opened(self.entries[name].file) as file:
            return file.get_tensor(name)

    def _add(self, path: Path) -> None:
        with _opened(path) as file:
            _refuse_doubles(path)
            for name in file.keys():  # it is no mapping
                view = file.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:  # float64 among them, which float32 would round
                    remedy = (
                        f"only {', '.join(DTYPES)} are supported; convert it, as model.float() does in transformers"
                    )
                    raise InputError(f"{path}: {name} is {view.get_dtype()}; {remedy}")
                if name in self.entries:
                    raise InputError(f"{path}: {name} is in {self.entries[name].file.name}, too")
                self.entries[name] = Entry(path, tuple(view.get_shape()), dtype)

    def _add_shards(self, folder: Path) -> None:
        """Every tensor must be in the shard that the index names for it, and every one of a shard in the index."""
        index = folder / INDEX
        listed = _weight_map(index)
        for file in sorted(set(listed.values())):
            if not (folder / file).is_file():
                raise InputError(f"{folder / file}: is missing, though {INDEX} lists it; fetch it again")
            self._add(folder / file)
        held = {name: entry.file.name for name, entry in self.entries.items()}
        for name in sorted(listed.keys() | held.keys()):
            if listed.get(name) != held.get(name):
                where = f"{held.get(name)} holds it" if name in held else "no shard holds it"
                raise InputError(f"{index}: places {name} in {listed.get(name)}, but {where}; fetch the files again")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, in the folder of the index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: has no weight_map; fetch the file again")
    for name, file in listed.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise InputError(f"{index}: {name} is in {file!r}, which is no name of a .safetensors file beside it")
    return listed


def _refuse_doubles(path: Path) -> None:
    """A name that occurs twice in the header, of which the library takes the last."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            parse_json(file.read(size))
        except ValueError as error:
            raise InputError(f"{path}: its header {error}") from None


def _opened(path: Path) -> safe_open:
    """The library checks the header: its size, and that the tensors cover the file, once each."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is not a readable safetensors file ({error}); fetch it again") from None


def write_tensors(
    folder: Path, sizes: dict[str, int], make: Callable[[str], Tensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors of `sizes` bytes, each made when its shard's turn comes, to one file or to several and an index."""
    shards = _cut(sizes, max_shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        safetensors.torch.save_file({name: make(name) for name in sizes}, folder / SINGLE, metadata)
        return
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.torch.save_file({name: make(name) for name in names}, folder / file, metadata)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in turn, cut where the bytes of a shard would exceed the limit; one tensor may exceed it alone."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def missing_and_unexpected(wanted: Set[str], held: Set[str], where: str) -> None:
    """InputError that names the first few of either."""
    for what, names in (("misses", wanted - held), ("has unexpected", held - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise InputError(f"{where}: {what} {shown}")
