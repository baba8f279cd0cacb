"""Dataset: a damaged folder is refused by name; batches depend on their arguments alone and cover every epoch."""

import json
import pickle
import time

import numpy as np
import pytest

from llmfast.data import Dataset, prepare, write_shard
from llmfast.errors import InputError
from llmfast.tokenizers import Tokenizer

TEXT = "".join(f"{i} is followed by {i + 1}\n" for i in range(3000))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    prepare(str(tmp_path / "t.txt"), tmp_path / "data", vocab_size=300)
    return tmp_path / "data"


def counting(n_tokens, tmp_path):
    """A dataset whose token at position i is i, so that a batch shows where it was read."""
    return Dataset(tmp_path, None, {"train": np.arange(n_tokens, dtype=np.uint32)})


def test_reads_back_the_text(folder):
    dataset = Dataset.open(folder)
    assert dataset.text("train") + dataset.text("val") == TEXT.encode()
    assert dataset.n_bytes("train") + dataset.n_bytes("val") == len(TEXT)
    assert dataset.tokens("train").dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens("train")[0] = 1


def test_batch_is_consecutive_tokens(folder):
    dataset = Dataset.open(folder)
    batch = dataset.batch("train", 3, 8, 16, seed=1)
    assert batch.shape == (8, 17) and batch.dtype == np.int64
    text = dataset.text("train")
    assert all(dataset.tokenizer.decode_bytes(row[row != dataset.tokenizer.eot_id]) in text for row in batch)


def test_batch_is_a_pure_function(folder):
    first, resumed = Dataset.open(folder), Dataset.open(folder)
    run = [first.batch("train", step, 8, 16, seed=1) for step in range(300)]
    assert (resumed.batch("train", 299, 8, 16, seed=1) == run[299]).all()
    assert (first.batch("train", 0, 8, 16, seed=1) == run[0]).all()
    assert (first.batch("train", 0, 8, 16, seed=2) != run[0]).any()
    halves = [first.batch("train", 10 + half, 4, 16, seed=1) for half in range(2)]
    assert (np.concatenate(halves) == first.batch("train", 5, 8, 16, seed=1)).all()


@pytest.mark.parametrize(("n_tokens", "context"), [(1000, 10), (1001, 10), (21, 10), (11, 10), (20, 10), (50, 1)])
def test_each_epoch_visits_every_window_once(tmp_path, n_tokens, context):
    dataset = counting(n_tokens, tmp_path)
    n_windows = max(1, (n_tokens - context) // context)
    epochs = [dataset.batch("train", epoch, n_windows, context, seed=0) for epoch in range(30)]
    for rows in epochs:
        assert (np.diff(rows, axis=1) == 1).all() and rows.min() >= 0 and rows.max() < n_tokens
        starts = np.sort(rows[:, 0])
        assert (np.diff(starts) == context).all()
    if n_windows > 10:
        assert (epochs[0][:, 0] != epochs[1][:, 0]).any()
    phases = {int(rows[:, 0].min()) for rows in epochs}
    assert len(phases) > 1 or min(context, n_tokens - n_windows * context) == 1
    last_read = max(int(rows.max()) for rows in epochs)
    assert last_read == n_tokens - 1 or n_tokens > 2 * context


def test_batch_across_an_epoch_boundary(tmp_path):
    dataset = counting(101, tmp_path)
    n_windows = 9
    rows = dataset.batch("train", 0, 4 * n_windows, 10, seed=0)
    for epoch in range(4):
        here = np.sort(rows[epoch * n_windows : (epoch + 1) * n_windows, 0])
        assert (np.diff(here) == 10).all()
    later = dataset.batch("train", 1, n_windows, 10, seed=0)
    assert (later == rows[n_windows : 2 * n_windows]).all()


def test_batch_is_fast(tmp_path):
    dataset = counting(3_000_000, tmp_path)
    dataset.batch("train", 0, 64, 256, seed=0)
    times = []
    for step in range(1, 30):
        start = time.perf_counter()
        dataset.batch("train", step, 64, 256, seed=0)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 2e-3


def test_too_short_split_names_both_numbers(tmp_path):
    with pytest.raises(InputError, match=r"train holds 16 tokens, fewer than context \+ 1 = 17; use a shorter context"):
        counting(16, tmp_path).batch("train", 0, 1, 16, seed=0)
    assert counting(17, tmp_path).batch("train", 5, 1, 16, seed=0).tolist() == [list(range(17))]


@pytest.mark.parametrize(
    ("name", "value"), [("step", -1), ("batch_size", 0), ("context", 0), ("seed", -1)], ids=lambda value: str(value)
)
def test_bad_batch_arguments_are_named(tmp_path, name, value):
    arguments = {"step": 0, "batch_size": 1, "context": 4, "seed": 0} | {name: value}
    with pytest.raises(InputError, match=f"{name} {value} is not usable"):
        counting(100, tmp_path).batch("train", **arguments)


def test_unknown_split_is_named(folder):
    dataset = Dataset.open(folder)
    for read in (dataset.tokens, dataset.n_bytes, dataset.text):
        with pytest.raises(InputError, match="no split 'test' in .*data; use one of train, val"):
            read("test")


def test_not_a_data_folder(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: not a data folder"):
        Dataset.open(tmp_path)


def change_manifest(folder, change):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(format_version=9), "manifest.json: format llmfast-data 9, this llmfast reads 1"),
        (lambda fields: fields.pop("vocab_size"), "manifest.json: damaged"),
        (
            lambda fields: fields["splits"]["val"]["documents"].update(x="0"),
            "manifest.json: corpus_hash does not match",
        ),
        (lambda fields: fields["splits"]["val"].update(n_tokens=7), r"val holds \d+ tokens instead of 7"),
        (lambda fields: fields["splits"]["val"].update(shards={}), "val holds 0 tokens"),
    ],
)
def test_damaged_manifest_is_named(folder, change, message):
    change_manifest(folder, change)
    with pytest.raises(InputError, match=message):
        Dataset.open(folder)


def test_manifest_that_is_not_json_is_named(folder):
    for content in ((folder / "manifest.json").read_bytes()[:-20], b"[" * 100_000):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(InputError, match="manifest.json: damaged"):
            Dataset.open(folder)


def test_damaged_missing_and_foreign_shards_are_named(folder):
    path = folder / "val-00000-of-00001.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(InputError, match="val-00000-of-00001.bin: truncated"):
        Dataset.open(folder)
    path.unlink()
    with pytest.raises(InputError, match="val-00000-of-00001.bin: no such shard"):
        Dataset.open(folder)
    n_tokens = (len(raw) - 64) // 2
    write_shard(path, np.zeros(n_tokens, dtype=np.int64), 300)
    with pytest.raises(InputError, match="val-00000-of-00001.bin: not the shard that the manifest lists"):
        Dataset.open(folder)
    assert len(Dataset.open(folder, verify=False).tokens("val")) == n_tokens


def test_another_tokenizer_is_refused(folder):
    Tokenizer.train(["other"], 257).save(folder)
    dataset = Dataset.open(folder)
    with pytest.raises(InputError, match="tokenizer.json: not the tokenizer that made these tokens"):
        dataset.text("val")


def test_survives_pickling_without_its_tokens(folder):
    dataset = Dataset.open(folder)
    dataset.batch("train", 0, 8, 16, seed=1)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert (pickle.loads(pickled).batch("train", 3, 8, 16, 1) == dataset.batch("train", 3, 8, 16, 1)).all()
