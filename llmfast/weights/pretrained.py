"""Models in Hugging Face's format: read from a folder or by a hub name, and written to a folder."""

import json
import math
import re
import shutil
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import staged_folder
from ..models import GPT, Config
from .families import FAMILIES, Family, read_config, write_config
from .fields import read_json, settings
from .hub import local_folder
from .tensorfiles import DTYPES, MAX_SHARD_BYTES, TensorFiles, missing_and_unexpected, write_tensors

CONFIG = "config.json"
# What belongs to a model and is none of its weights: handed on as it is.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Source:
    """Where a model came from: what an export needs beside its weights and its Config.

    `dtype` holds all of its weights exactly; `dtypes` are those of its tensors that were stored in another one, by the
    names that they have there. `settings` are the token ids and the like of its config.json; `folder` holds its
    tokenizer and other companions.
    """

    family: str
    dtype: torch.dtype
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


class PretrainedGPT(GPT):
    """A GPT that came from a foreign folder and can go back to one."""

    source: Source

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """See `save_pretrained`."""
        save_pretrained(self, folder, source=self.source, **options)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> PretrainedGPT:
    """The model in a local folder, or of a hub name such as "openai-community/gpt2", on the CPU and in eval mode.

    Weights are kept in `dtype`, activations in `compute_dtype`; `revision` is a branch, tag or commit of the hub.
    Anything that would change what the model computes and is not supported, and every tensor that is missing, not
    expected or of another shape than config.json says, is refused by name, before memory is taken for the weights.
    """
    folder = local_folder(name, revision)
    values, files = read_json(folder / CONFIG), TensorFiles(folder)
    family_name, config = read_config(values, str(folder / CONFIG))
    family = FAMILIES[family_name]
    if config.n_layer > len(files.entries):
        raise InputError(f"{folder / CONFIG}: {config.n_layer} layers, but there are {len(files.entries)} tensors")
    with torch.device("meta"):
        model = PretrainedGPT(config, compute_dtype).to(dtype)
    names = _stored_names(family, files)
    parts = {own: _parts(family, config, own, tensor) for own, tensor in model.state_dict().items()}
    _check(family, config, files, names, [part for own in parts.values() for part in own], str(folder))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for own, tensor in model.state_dict().items():
            start = 0
            for part in parts[own]:
                stored = files.read(names[part.name])
                tensor[start : start + part.rows].copy_(stored.T if part.transposed else stored)
                start += part.rows
    model.refill_tables()
    dtypes = {name: files.entries[stored].dtype for name, stored in names.items()}
    widest = reduce(torch.promote_types, dtypes.values())
    others = {name: dtype for name, dtype in dtypes.items() if dtype != widest}
    model.source = Source(family_name, widest, folder, settings(values), others)
    return model.eval()  # pyright: ignore[reportReturnType]


def save_pretrained(
    model: GPT,
    folder: str | Path,
    *,
    source: Source | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `folder`, new or empty: config.json, safetensors, and the tokenizer and companions of `source`.

    The family is the given one, that of the source, or the first that can express the model; the dtype likewise, which
    each tensor has of its own in a source, or that of the parameters. What was loaded and not changed is written bit
    for bit as it was.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already and not an empty folder; give another one")
    same_dtypes = source is not None and dtype is None
    dtype = dtype or (source.dtype if source else model.token_embedding.weight.dtype)
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype}: choose one of {', '.join(map(str, DTYPES.values()))}")
    name, values = write_config(model.config, family or (source.family if source else None))
    known = dict(source.settings) if source and source.family == name else {}
    dtypes = source.dtypes if source and source.family == name and same_dtypes else {}
    text = str(dtype).removeprefix("torch.")
    with staged_folder(folder) as staging:
        content = known | values | {"dtype": text, "torch_dtype": text}
        (staging / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_weights(model, FAMILIES[name], staging, dtype, dtypes, max_shard_bytes)
        if source is not None:
            copy_companions(source.folder, staging)


def family_of(config: Config) -> str:
    """The first family that can express `config`."""
    return write_config(config)[0]


def copy_companions(folder: Path, out: Path) -> None:
    """Copy tokenizer, chat template and generation settings, as far as there are any."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is gone, and with it the tokenizer; restore it")
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


@dataclass(frozen=True)
class _Part:
    """A foreign tensor, which is `rows` rows of one of ours."""

    name: str
    rows: int
    shape: tuple[int, ...]
    transposed: bool


def _parts(family: Family, config: Config, own: str, tensor: Tensor) -> list[_Part]:
    """The foreign tensors that our parameter `own` is made of, in the order of its rows."""
    module, _, kind = own.rpartition(".")
    layer = re.match(r"blocks\.(\d+)\.", module)
    pattern = module.replace(f"blocks.{layer[1]}.", "blocks.{}.") if layer else module
    foreign = family.modules[pattern]
    rows = [len(tensor)]
    if len(foreign) == 3:
        rows = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
    elif len(foreign) == 2:
        rows = [config.d_mlp, config.d_mlp]
    transposed = family.transposed and layer is not None and tensor.dim() == 2
    parts = []
    for name, n in zip(foreign, rows, strict=True):
        shape = (n, *tensor.shape[1:])
        full = f"{name.format(layer[1]) if layer else name}.{kind}"
        parts.append(_Part(full, n, shape[::-1] if transposed else shape, transposed))
    return parts


def _stored_names(family: Family, files: TensorFiles) -> dict[str, str]:
    """Full name -> name in the files, which may lack the prefix; tensors that are no weights are left out."""
    held = [name for name in files.entries if not name.endswith(family.dropped)]
    bare = not any(name.startswith(family.prefix) for name in held)
    return {family.prefix + name if bare and not name.startswith("lm_head.") else name: name for name in held}


def _check(
    family: Family, config: Config, files: TensorFiles, names: dict[str, str], parts: list[_Part], where: str
) -> None:
    """The files hold exactly the parts, in their shapes; of a tied model also its head, if it is the embedding."""
    head, embedding = "lm_head.weight", f"{family.modules['token_embedding'][0]}.weight"
    if config.tie_embeddings and {head, embedding} <= names.keys():
        same = files.entries[names[head]].shape == files.entries[names[embedding]].shape
        if not same or not torch.equal(files.read(names[head]), files.read(names[embedding])):
            raise InputError(f"{where}: {head} differs from {embedding}, but config.json ties them")
        del names[head]
    missing_and_unexpected({part.name for part in parts}, names.keys(), where)
    for part in parts:
        shape = files.entries[names[part.name]].shape
        if shape != part.shape:
            raise InputError(f"{where}: {part.name} has shape {shape}; config.json asks for {part.shape}")


def _write_weights(
    model: GPT,
    family: Family,
    folder: Path,
    dtype: torch.dtype,
    dtypes: dict[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    """In `dtype`, but for the tensors that `dtypes` names."""
    rows: dict[str, tuple[Tensor, int, _Part]] = {}
    for own, tensor in model.state_dict().items():
        start = 0
        for part in _parts(family, model.config, own, tensor):
            rows[part.name] = tensor, start, part
            start += part.rows

    def make(name: str) -> Tensor:
        tensor, start, part = rows[name]
        own = tensor[start : start + part.rows].detach()
        return (own.T if part.transposed else own).to("cpu", dtypes.get(name, dtype), copy=True).contiguous()

    sizes = {name: math.prod(part.shape) * dtypes.get(name, dtype).itemsize for name, (_, _, part) in rows.items()}
    write_tensors(folder, sizes, make, max_shard_bytes)
