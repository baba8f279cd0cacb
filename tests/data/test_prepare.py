"""prepare: both splits exact and disjoint, all or nothing on disk, nothing of the user's overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmfast.data import Dataset, Manifest, prepare
from llmfast.data.prepare import _check_disjoint, split_documents
from llmfast.data.sources import Document
from llmfast.errors import InputError
from llmfast.tokenizers import END_OF_TEXT, Tokenizer

STORY = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400))


def make_folder(root, n_groups=40):
    for i in range(n_groups):
        (root / f"group{i}").mkdir(parents=True)
        for j in range(3):
            (root / f"group{i}" / f"{j}.txt").write_text(f"group {i} file {j} {END_OF_TEXT} é\n" * (5 + j))
    (root / "empty.txt").write_text("")
    (root / "zz.txt").write_text((root / "group0" / "0.txt").read_text())
    return str(root)


def documents(*sizes, group=None):
    return [Document(f"d{i}", group or f"g{i}", (f"{i:04d}" + "x" * 45 + "\n") * size) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    heard = []
    source = make_folder(root / "corpus")
    manifest = prepare(source, root / "out", vocab_size=300, on_progress=lambda *event: heard.append(event))
    return root, source, manifest, heard


def test_manifest_says_what_happened(prepared):
    root, source, manifest, _ = prepared
    assert Manifest.load(root / "out") == manifest
    assert manifest.source == source and manifest.python_version is None
    assert manifest.skipped == {"empty.txt": "empty"}
    assert manifest.duplicates == {"group0/0.txt": "zz.txt"}
    assert manifest.vocab_size == 300
    assert manifest.tokenizer_fingerprint == Tokenizer.load(root / "out").fingerprint
    assert sorted(path.name for path in (root / "out").iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "train-00000-of-00001.bin",
        "val-00000-of-00001.bin",
    ]


def test_splits_are_exact_and_disjoint(prepared):
    root, source, manifest, _ = prepared
    dataset = Dataset.open(root / "out")
    train, val = manifest.splits["train"], manifest.splits["val"]
    assert not set(train.documents.values()) & set(val.documents.values())
    assert not {name.split("/")[0] for name in train.documents} & {name.split("/")[0] for name in val.documents}
    assert len(train.documents) + len(val.documents) == 120
    assert 0.03 < val.n_bytes / (train.n_bytes + val.n_bytes) < 0.07
    for name, split in manifest.splits.items():
        expected = b"".join(open(os.path.join(source, file), "rb").read() for file in split.documents)
        assert dataset.text(name) == expected and split.n_bytes == len(expected)
        tokens = dataset.tokens(name)
        assert len(tokens) == split.n_tokens and tokens[-1] == dataset.tokenizer.eot_id
        assert (tokens == dataset.tokenizer.eot_id).sum() == len(split.documents)


def test_tokenizer_never_saw_the_validation_text(tmp_path):
    source = tmp_path / "tale.txt"
    source.write_text(STORY + "zyzzyva " * 180 + "\n")
    prepare(str(source), tmp_path / "out", vocab_size=400)
    dataset = Dataset.open(tmp_path / "out")
    assert b"zyzzyva" in dataset.text("val") and b"zyzzyva" not in dataset.text("train")
    assert len(dataset.tokenizer.encode("zyzzyva")) == len("zyzzyva")


def test_progress_is_heard(prepared):
    *_, heard = prepared
    assert [event[0] for event in heard if event[1] == 1.0] == ["read", "tokenizer", "train", "val"]
    assert all(0 <= fraction <= 1 for _, fraction in heard)


def test_same_corpus_gives_the_same_folder(prepared, tmp_path):
    root, source, manifest, _ = prepared
    assert prepare(source, tmp_path / "out", vocab_size=300) == manifest
    for path in (root / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_corpus_hash_depends_on_the_text_only(tmp_path):
    source = tmp_path / "tale.txt"
    source.write_text(STORY)
    first = prepare(str(source), tmp_path / "a", vocab_size=300)
    assert prepare(str(source), tmp_path / "b", vocab_size=280).corpus_hash == first.corpus_hash
    source.write_text(STORY + "x\n")
    assert prepare(str(source), tmp_path / "b", vocab_size=300).corpus_hash != first.corpus_hash


def test_many_shards_join_to_the_same_tokens(tmp_path):
    source = tmp_path / "tale.txt"
    source.write_text(STORY)
    prepare(str(source), tmp_path / "one", vocab_size=300)
    manifest = prepare(str(source), tmp_path / "many", vocab_size=300, shard_tokens=1000)
    one, many = Dataset.open(tmp_path / "one"), Dataset.open(tmp_path / "many")
    assert len(manifest.splits["train"].shards) == -(-manifest.splits["train"].n_tokens // 1000) > 1
    assert (one.tokens("train") == many.tokens("train")).all()
    assert not many.tokens("train").flags.writeable
    assert many.text("val") == one.text("val")


def test_given_tokenizer_is_used(tmp_path):
    (tmp_path / "tale.txt").write_text(STORY)
    tokenizer = Tokenizer.train(["abcabc"], 260)
    tokenizer.save(tmp_path / "mine.json")
    manifest = prepare(str(tmp_path / "tale.txt"), tmp_path / "out", tokenizer=tmp_path / "mine.json")
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint and manifest.vocab_size == tokenizer.vocab_size


def test_lossy_tokenizer_is_refused(tmp_path):
    (tmp_path / "tale.txt").write_text(STORY)
    Tokenizer.train([STORY], 260).save(tmp_path / "mine.json")
    fields = json.loads((tmp_path / "mine.json").read_text())
    fields["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    (tmp_path / "tale.txt").write_text(STORY.replace("fox", "FOX"))
    with pytest.raises(InputError, match=r"tale.txt\[:\d+\]: the tokenizer does not reproduce its bytes"):
        prepare(str(tmp_path / "tale.txt"), tmp_path / "out", tokenizer=tmp_path / "mine.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "tale.txt"]


def test_split_by_group_keeps_groups_whole():
    parts = split_documents([*documents(*[4] * 40), *documents(2, group="g3")], 0.05)
    assert not {d.group for d in parts["train"]} & {d.group for d in parts["val"]}
    assert 0.025 <= len(parts["val"]) / 41 <= 0.075


def test_split_of_very_unequal_groups_is_not_a_tiny_one():
    parts = split_documents(documents(1, 200, 200), 0.05)
    assert [d.name for d in parts["val"]] == ["d1[9000:]"]


def test_split_is_the_same_on_every_machine():
    assert [d.name for d in split_documents(documents(*[4] * 40), 0.1)["val"]] == ["d6", "d9", "d26", "d38"]


def test_overlapping_splits_are_never_written(tmp_path, monkeypatch):
    (tmp_path / "tale.txt").write_text(STORY)
    both = {"train": documents(5), "val": documents(5)}
    monkeypatch.setattr(sys.modules["llmfast.data.prepare"], "split_documents", lambda *_: both)
    with pytest.raises(InputError, match="d0 of val equals d0 of train"):
        prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


def test_split_does_not_depend_on_order():
    many = documents(*[4] * 40)
    assert {d.name for d in split_documents(many, 0.1)["val"]} == {
        d.name for d in split_documents(many[::-1], 0.1)["val"]
    }


def test_split_of_one_group_is_by_document():
    parts = split_documents(documents(*[4] * 40, group="all"), 0.05)
    assert len(parts["val"]) == 2 and len(parts["train"]) == 38


def test_split_of_one_document_is_at_a_line():
    (whole,) = documents(100)
    parts = split_documents([whole], 0.05)
    (train,), (val,) = parts["train"], parts["val"]
    assert train.text + val.text == whole.text and train.text.endswith("\n") and len(val.text) == 250
    assert (train.name, val.name) == ("d0[:4750]", "d0[4750:]")


def test_split_of_two_large_documents_cuts_the_larger():
    parts = split_documents(documents(40, 60), 0.05)
    assert [d.name for d in parts["train"]] == ["d0", "d1[:2750]"] and [d.name for d in parts["val"]] == ["d1[2750:]"]


def test_split_of_one_long_line_is_at_a_word():
    whole = Document("d", "d", "wörd " * 1000)
    parts = split_documents([whole], 0.05)
    assert parts["train"][0].text + parts["val"][0].text == whole.text
    assert parts["val"][0].text == "wörd " * 50


def test_a_document_in_both_splits_is_refused():
    one, two = Document("one", "g", "same\n"), Document("two", "h", "same\n")
    with pytest.raises(InputError, match="two of val equals one of train"):
        _check_disjoint({"train": [one], "val": [two]})


@pytest.mark.parametrize("text", ["hi\n", "a b\n", "x" * 5000])
def test_too_short_text_is_refused(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match=f"t.txt: {len(text)} bytes are too short"):
        prepare(str(tmp_path / "t.txt"), tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"val_fraction": 0.0}, {"val_fraction": 0.5}, {"shard_tokens": 0}], ids=str)
def test_bad_options_are_named(tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"{name} {value} is not usable"):
        prepare("stdlib", tmp_path / "out", **option)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "tale.txt").write_text(STORY)
    source, out = str(tmp_path / "tale.txt"), tmp_path / "out"
    out.mkdir()
    prepare(source, out, vocab_size=300)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="out: holds notes.txt"):
        prepare(source, out, vocab_size=300)
    (out / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(InputError, match="out: not empty and not a data folder"):
        prepare(source, out, vocab_size=300)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="tale.txt: is a file"):
        prepare(source, source, vocab_size=300)


@pytest.mark.parametrize("old_version", [1, 0])
def test_older_data_folder_is_replaced(tmp_path, old_version):
    (tmp_path / "tale.txt").write_text(STORY)
    prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=300, shard_tokens=100)
    text = (tmp_path / "out" / "manifest.json").read_text()
    (tmp_path / "out" / "manifest.json").write_text(
        text.replace('"format_version": 1', f'"format_version": {old_version}')
    )
    manifest = prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=290)
    assert Dataset.open(tmp_path / "out").manifest == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tale.txt"]


def test_failure_keeps_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "tale.txt").write_text(STORY)
    old = prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=300)

    def full(*_):
        raise OSError(28, "No space left on device")

    # The function of the same name hides the module from a dotted path.
    monkeypatch.setattr(sys.modules["llmfast.data.prepare"], "write_shard", full)
    with pytest.raises(OSError, match="No space"):
        prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=290)
    assert Dataset.open(tmp_path / "out").manifest == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tale.txt"]


def test_failed_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "tale.txt").write_text(STORY)
    old = prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=300)
    rename = Path.rename

    def refuse_new_folder(self, target):
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new_folder)
    with pytest.raises(OSError, match="Input/output"):
        prepare(str(tmp_path / "tale.txt"), tmp_path / "out", vocab_size=290)
    assert Dataset.open(tmp_path / "out").manifest == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tale.txt"]


def test_kill_leaves_nothing_half_made(tmp_path):
    (tmp_path / "tale.txt").write_text(STORY)
    code = (
        "import sys, time; from llmfast.data import prepare\n"
        "def wait(stage, fraction):\n"
        "    if stage == 'val': print('writing', flush=True); time.sleep(60)\n"
        "prepare(sys.argv[1], sys.argv[2], vocab_size=300, on_progress=wait)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "tale.txt"), str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert any(path.name.startswith(".out.tmp-") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()


def test_stdlib_is_prepared_in_seconds(tmp_path):
    start = time.process_time()  # of all threads; 6 s on a slow one. What else the machine does must not count.
    manifest = prepare("stdlib", tmp_path / "out", vocab_size=512)
    assert time.process_time() - start < 30
    assert manifest.splits["train"].n_bytes > 5e6 and manifest.python_version is not None
