"""A cache of its own, a small text, its data folder, and the command line in this process."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmfast.cli.main import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LLMFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of words, repeated often enough to be learned from."""
    words = [f"w{n}" for n in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = random.Random(0)
    path.write_text("\n".join(" ".join(generator.choices(words, k=8)) for _ in range(1300)))
    return path


@pytest.fixture(scope="module")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmfast.data import prepare

    folder = tmp_path_factory.mktemp("data") / "words"
    prepare(str(text), folder, vocab_size=512)
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run `llmfast` in this process: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmfast", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def refused() -> Callable[..., None]:
    """refused(result of cli, *parts): exit code 2, and one line on stderr that holds `parts`."""

    def refused(result: tuple[int, str, str], *parts: str) -> None:
        code, _, err = result
        assert code == 2, err
        assert err.startswith("llmfast: error: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err

    return refused
