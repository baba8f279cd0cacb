"""What importing llmfast costs, and where its kernels come from."""

import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmfast

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints, away from the checkout, so that the current folder plays no part."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    package = str(Path(llmfast.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (package, env.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    """The top-level modules in memory after `code`."""
    return set(json.loads(python("-c", f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))")))


def test_import_llmfast_loads_nothing_else() -> None:
    loaded = loaded_after("import llmfast\nassert llmfast.__version__")
    assert not {"torch", "triton", "transformers", "numpy"} & loaded
    assert {name for name in loaded if name.startswith("llmfast")} == {"llmfast"}


@pytest.mark.parametrize(
    "code",
    [
        "import llmfast, llmfast.ops, llmfast.models",
        "import llmfast\nllmfast.ops, llmfast.GPT, llmfast.Config, llmfast.PRESETS",
        "import torch, llmfast\nllmfast.ops.softmax(torch.ones(3))",
    ],
)
def test_triton_and_transformers_stay_out(code: str) -> None:
    """Not even for a call that auto gives to the reference."""
    loaded = loaded_after(code)
    assert "torch" in loaded and not {"triton", "transformers"} & loaded


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="llmfast.*'nothing'"):
        llmfast.nothing  # noqa: B018


def test_import_adds_little_to_torchs() -> None:
    """Timed in one process after torch, which takes seconds of its own; the best of three."""
    code = "import time, torch; start = time.perf_counter(); import llmfast, llmfast.ops, llmfast.models"
    seconds = [float(python("-c", f"{code}; print(time.perf_counter() - start)")) for _ in range(3)]
    assert min(seconds) < 0.3


def test_kernels_are_the_top_level_folder() -> None:
    if Path(llmfast.__file__).resolve().parents[1] != ROOT:
        pytest.skip("an installed llmfast holds its kernels itself")
    import llmfast.kernels as package  # noqa: TID251

    assert [Path(p) for p in package.__path__] == [ROOT / "kernels"]
    for file in (ROOT / "kernels").glob("*.py"):
        spec = importlib.machinery.PathFinder.find_spec(f"llmfast.kernels.{file.stem}", package.__path__)
        assert spec is not None and spec.origin == str(file)


def test_command_line_help() -> None:
    """Every command is listed, and none of what they need is imported for it."""
    code = (
        "import sys\nfrom llmfast.cli.main import main\nsys.argv = ['llmfast', '--help']\ntry:\n    main()\nfinally:\n"
    )
    out = python("-c", f"{code}    print('torch' in sys.modules, 'numpy' in sys.modules)", COLUMNS="100")
    assert all(command in out for command in ("train", "generate", "data", "tokenizer", "bench", "doctor"))
    assert out.endswith("False False\n")


def test_version() -> None:
    assert python("-m", "llmfast.cli.main", "--version").strip() == f"llmfast {llmfast.__version__}"
