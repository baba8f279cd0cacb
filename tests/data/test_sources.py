"""Sources: what is read, what is skipped and said so, what is refused."""

import json
import os
import platform
import sys
from pathlib import Path

import pytest

from llmfast.data.sources import read_source
from llmfast.errors import InputError


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def names(corpus):
    return [document.name for document in corpus.documents]


def test_folder_groups_order_and_skips(tmp_path):
    source = write(
        tmp_path,
        {
            "b/two.txt": "two\n",
            "b/deep/one.txt": "one\n",
            "a.py": "x = 1\n",
            "c.txt": "two\n",
            "blob.bin": b"a\0b",
            "empty.txt": "  \n",
            "latin.txt": b"caf\xe9",
            ".git/config": "hidden\n",
            ".hidden": "hidden\n",
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "link.txt")
    corpus = read_source(source)
    assert [(document.name, document.group, document.text) for document in corpus.documents] == [
        ("a.py", "a", "x = 1\n"),
        ("c.txt", "c.txt", "two\n"),
        ("b/deep/one.txt", "b", "one\n"),
    ]
    assert corpus.duplicates == {"b/two.txt": "c.txt"}
    assert corpus.python_version is None
    assert set(corpus.skipped) == {"blob.bin", "empty.txt", "latin.txt", "link.txt"}
    assert "NUL" in corpus.skipped["blob.bin"] and corpus.skipped["empty.txt"] == "empty"
    assert corpus.skipped["latin.txt"] == "not utf-8 text (byte 3)"
    assert corpus.skipped["link.txt"] == "not a regular file"


def test_encodings_of_python_files(tmp_path):
    source = write(
        tmp_path,
        {
            "cookie.py": b"# -*- coding: latin-1 -*-\ns = '\xe9'\n",
            "bom.py": b"\xef\xbb\xbfx = 1\n",
            "bad_bytes.py": b"s = 1\n# one\n# \xe9\n",
            "bad_cookie.py": b"# coding: klingon\n",
            "bom.txt": b"\xef\xbb\xbfbom\n",
        },
    )
    corpus = read_source(source)
    texts = {document.name: document.text for document in corpus.documents}
    assert texts == {"cookie.py": "# -*- coding: latin-1 -*-\ns = 'é'\n", "bom.py": "x = 1\n", "bom.txt": "bom\n"}
    assert "klingon" in corpus.skipped["bad_cookie.py"]
    assert "not utf-8" in corpus.skipped["bad_bytes.py"]


def test_single_text_file(tmp_path):
    write(tmp_path, {"tale.txt": "Once upon\r\na time\n"})
    (document,) = read_source(str(tmp_path / "tale.txt")).documents
    assert (document.name, document.group, document.text) == ("tale.txt", "tale.txt", "Once upon\r\na time\n")


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": f"line {i}\u2028", "id": i}, ensure_ascii=False) for i in range(11)]
    source = write(tmp_path, {"d.jsonl": "\n".join(lines) + "\n\n"}) + "/d.jsonl"
    documents = read_source(source).documents
    assert [document.text for document in documents] == [f"line {i}\u2028" for i in range(11)]
    assert documents[10].name == "d.jsonl:11" and documents[10].group == "d.jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", 'not a JSON object with a "text" string'),
        ('["text"]', 'not a JSON object with a "text" string'),
        ('{"body": "x"}', 'not a JSON object with a "text" string'),
        ("[" * 100_000, 'not a JSON object with a "text" string'),
        ('{"text": 5}', 'not a JSON object with a "text" string'),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": " "}', "empty"),
    ],
)
def test_broken_json_line_is_named(tmp_path, line, message):
    write(tmp_path, {"d.jsonl": '{"text": "ok"}\n' + line + "\n"})
    for source in (tmp_path / "d.jsonl", tmp_path):
        with pytest.raises(InputError) as caught:
            read_source(str(source))
        assert f"{tmp_path}/d.jsonl:2: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\0b", "binary, holds NUL"), (b"\n \n", "empty"), (b"caf\xe9", "not utf-8")]
)
def test_unreadable_file_given_directly_is_refused(tmp_path, content, message):
    source = write(tmp_path, {"f.txt": content}) + "/f.txt"
    with pytest.raises(InputError, match=f"{source}: {message}"):
        read_source(source)


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/absent: no such file or folder"):
        read_source(str(tmp_path / "absent"))
    with pytest.raises(InputError, match=f"{tmp_path}: no text in it"):
        read_source(str(tmp_path))


def test_unlistable_folder_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a"})

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be listed .Permission denied"):
        read_source(str(tmp_path))


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A stand-in for the standard library, so that the rules are tested and not one installation."""
    root = write(
        tmp_path,
        {
            "abc.py": "abc = 1\n",
            "json/decoder.py": "decoder = 1\n",
            "json/notes.txt": "no module\n",
            "test/test_abc.py": "t = 1\n",
            "json/tests/x.py": "t = 2\n",
            "idlelib/idle_test/x.py": "t = 3\n",
            "idlelib/run.py": "run = 1\n",
            "encodings/cp1.py": "t = 4\n",
            "pydoc_data/topics.py": "t = 5\n",
            "site-packages/numpy.py": "t = 6\n",
            "__pycache__/abc.py": "t = 7\n",
            "_sysconfigdata__linux.py": "t = 8\n",
        },
    )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": root})


def test_stdlib_selection(small_library):
    corpus = read_source("stdlib")
    assert [name for name in names(corpus) if not name.startswith("pydoc_topics/")] == [
        "abc.py",
        "idlelib/run.py",
        "json/decoder.py",
    ]
    assert {document.group for document in corpus.documents} == {"abc", "idlelib", "json", "pydoc_topics"}
    assert "pydoc_topics/assert" in names(corpus)
    assert corpus.python_version == platform.python_version()


def test_stdlib_without_pydoc_topics_says_so(small_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = read_source("stdlib")
    assert "not installed" in corpus.skipped["pydoc_topics"]
    assert len(corpus.documents) == 3


def test_stdlib_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "python.zip")})
    with pytest.raises(InputError, match="stdlib: .*python.zip; give a folder"):
        read_source("stdlib")


def test_a_data_folder_and_an_empty_name_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "train-00000-of-00001.bin").write_bytes(b"")
    with pytest.raises(InputError, match="is a data folder.*prepare its text again"):
        read_source(str(tmp_path))
    with pytest.raises(InputError, match="the source is an empty string"):
        read_source("")
