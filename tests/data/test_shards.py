"""Shards: exact round trip, and every kind of damage named."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.data import shards
from llmfast.data.shards import HEADER_BYTES, open_shard, write_shard
from llmfast.errors import InputError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "t.bin"
    write_shard(path, np.arange(100), 100)
    return path


def repack(path, payload, vocab_size, itemsize=2, count=None, version=shards.VERSION):
    """A shard with a correct crc32 whatever its fields say."""
    count = len(payload) // itemsize if count is None else count
    fields = shards._FIELDS.pack(shards.MAGIC, version, itemsize, vocab_size, count)
    crc = shards._CRC.pack(zlib.crc32(payload, zlib.crc32(fields)))
    path.write_bytes((fields + crc).ljust(HEADER_BYTES, b"\0") + payload)


@given(st.data())
def test_round_trip(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([1, 257, 2**16, 2**16 + 1, 2**32]))
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20))
    path = tmp_path_factory.mktemp("shard") / "t.bin"
    write_shard(path, np.array(ids, dtype=np.int64), vocab_size)
    tokens = open_shard(path)
    assert tokens.tolist() == ids
    assert tokens.dtype == (np.uint16 if vocab_size <= 2**16 else np.uint32)
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


@pytest.mark.parametrize(("vocab_size", "bad"), [(100, 100), (100, -1), (2**16, 2**16)])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, vocab_size, bad):
    with pytest.raises(InputError, match=f"t.bin: token id {bad} is outside the vocabulary of {vocab_size}"):
        write_shard(tmp_path / "t.bin", np.array([0, bad]), vocab_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [np.array([], dtype=np.int64), np.zeros((2, 2), dtype=np.int64), np.array([0.5])])
def test_only_non_empty_integer_rows_are_written(tmp_path, tokens):
    with pytest.raises(InputError, match="give a non-empty 1-D integer array"):
        write_shard(tmp_path / "t.bin", tokens, 10)


@pytest.mark.parametrize("vocab_size", [0, 2**32 + 1])
def test_impossible_vocabulary_is_refused(tmp_path, vocab_size):
    with pytest.raises(InputError, match=f"vocab_size {vocab_size} "):
        write_shard(tmp_path / "t.bin", np.array([0]), vocab_size)


def test_a_failed_write_keeps_the_old_shard(shard, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_shard(shard, np.array([7]), 100)
    assert open_shard(shard).tolist() == list(range(100))
    assert [path.name for path in shard.parent.iterdir()] == ["t.bin"]


def test_missing_shard_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.bin: no such shard"):
        open_shard(tmp_path / "absent.bin")


DAMAGE = {
    "truncated payload": (lambda raw: raw[:-1], "truncated, 263 bytes instead of 264 for 100 tokens"),
    "truncated header": (lambda raw: raw[:40], "truncated inside the header, 40 of 64 bytes"),
    "no bytes": (lambda raw: b"", "not a llmfast token shard"),
    "another file": (lambda raw: b"PK\3\4" + raw, "not a llmfast token shard"),
    "version": (lambda raw: raw[:8] + b"\2" + raw[9:], "shard format version 2, this llmfast reads 1"),
    "trailing bytes": (lambda raw: raw + b"\0\0", "trailing bytes, 266 bytes instead of 264"),
    "dtype": (lambda raw: raw[:12] + b"\4" + raw[13:], "damaged header .4 bytes per token"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(shard, kind, verify):
    damage, message = DAMAGE[kind]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match=f"t.bin: {message}"):
        open_shard(shard, verify)


@pytest.mark.parametrize("position", [16, HEADER_BYTES, HEADER_BYTES + 199])
def test_a_flipped_bit_fails_the_crc(shard, position):
    raw = bytearray(shard.read_bytes())
    raw[position] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match="t.bin: crc32 is [0-9a-f]{8} instead of [0-9a-f]{8}"):
        open_shard(shard)
    assert len(open_shard(shard, verify=False)) == 100


def test_id_beyond_the_vocabulary_is_named(tmp_path):
    path = tmp_path / "t.bin"
    repack(path, np.array([3, 10, 4], dtype="<u2").tobytes(), vocab_size=10)
    with pytest.raises(InputError, match="t.bin: token id 10 is outside the vocabulary of 10"):
        open_shard(path)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 2**16 + 1}, {"vocab_size": 0}, {"vocab_size": 10, "count": 0}], ids=str
)
def test_impossible_header_is_named(tmp_path, fields):
    path = tmp_path / "t.bin"
    repack(path, b"\0\0", **fields)
    with pytest.raises(InputError, match="t.bin: damaged header"):
        open_shard(path)
