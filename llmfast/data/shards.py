"""Token shards: a 64-byte header and the ids as little-endian uint16 or uint32, mapped into memory when read.

Header: magic (8 bytes), version u32, bytes per token u32, vocab_size u64, token count u64, crc32 u32 of the fields
before it and the payload, zeros up to 64 bytes.
"""

import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import write_atomic

MAGIC = b"LLMFTOK\0"
VERSION = 1
HEADER_BYTES = 64
_FIELDS = struct.Struct("<8sIIQQ")
_CRC = struct.Struct("<I")
_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_REBUILD = "run prepare again"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id of the vocabulary fits it, else uint32."""
    if not 1 <= vocab_size <= 2**32:
        raise InputError(f"vocab_size {vocab_size} cannot be stored; use 1 to {2**32}")
    return _DTYPES[2 if vocab_size <= 2**16 else 4]


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes the 1-D integer array `tokens` atomically; InputError for no tokens or an id outside the vocabulary."""
    path = Path(path)
    dtype = token_dtype(vocab_size)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise InputError(f"{path}: tokens of shape {tokens.shape}, {tokens.dtype}; give a non-empty 1-D integer array")
    _check_range(path, tokens, vocab_size, "encode with the tokenizer of this vocabulary")
    payload = tokens.astype(dtype).tobytes()
    fields = _FIELDS.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, tokens.size)
    header = fields + _CRC.pack(zlib.crc32(payload, zlib.crc32(fields)))
    write_atomic(path, header.ljust(HEADER_BYTES, b"\0"), payload)


def open_shard(path: str | Path, verify: bool = True) -> np.memmap:
    """Read-only ids of the shard at `path`, shape (count,), uint16 or uint32.

    Header and size are always checked; `verify` also reads the payload once to check its crc32 and every id. InputError
    names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such shard; {_REBUILD}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if header[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path}: not a llmfast token shard (it starts with {header[:8]!r}); {_REBUILD}")
    if len(header) < HEADER_BYTES:
        raise InputError(f"{path}: truncated inside the header, {size} of {HEADER_BYTES} bytes; {_REBUILD}")
    _, version, itemsize, vocab_size, count = _FIELDS.unpack_from(header)
    (crc,) = _CRC.unpack_from(header, _FIELDS.size)
    if version != VERSION:
        raise InputError(f"{path}: shard format version {version}, this llmfast reads {VERSION}; {_REBUILD}")
    if not 1 <= vocab_size <= 2**32 or itemsize != token_dtype(vocab_size).itemsize or not count:
        raise InputError(
            f"{path}: damaged header ({itemsize} bytes per token, vocab_size {vocab_size}, {count} tokens); {_REBUILD}"
        )
    expected = HEADER_BYTES + count * itemsize
    if size != expected:
        problem = "truncated" if size < expected else "trailing bytes"
        raise InputError(f"{path}: {problem}, {size} bytes instead of {expected} for {count} tokens; {_REBUILD}")
    tokens = np.memmap(path, dtype=_DTYPES[itemsize], mode="r", offset=HEADER_BYTES, shape=(count,))
    if verify:
        found = zlib.crc32(tokens.data, zlib.crc32(header[: _FIELDS.size]))
        if found != crc:
            raise InputError(f"{path}: crc32 is {found:08x} instead of {crc:08x}, the file is damaged; {_REBUILD}")
        _check_range(path, tokens, vocab_size, _REBUILD)
    return tokens


def _check_range(path: Path, tokens: np.ndarray, vocab_size: int, remedy: str) -> None:
    for extreme in (tokens.min(), tokens.max()):
        if not 0 <= extreme < vocab_size:
            raise InputError(f"{path}: token id {extreme} is outside the vocabulary of {vocab_size}; {remedy}")
