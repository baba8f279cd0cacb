"""The layout of the source: who may import whom, who reads the environment, and how long a file may grow."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package or module of llmfast -> its floor. It imports lower floors and itself, nothing beside or above it.
FLOORS = {
    "cli": 7,
    "integrations": 7,
    "finetune": 6,
    "training": 5,
    "evals": 5,
    "serve": 5,
    "data": 4,
    "weights": 4,
    "inference": 4,
    "models": 3,
    "nn": 3,
    "tokenizers": 3,
    "testing": 3,
    "ops": 2,
    "hardware": 1,
    "native": 1,
    "errors": 0,
    "environment": 0,
    "files": 0,
    "kernels": 0,
}
# llmfast/__init__.py re-exports the ops, the models and the ways to load and write them, and nothing above.
FACADE_FLOOR = FLOORS["weights"] + 1

# What compares with transformers imports it when it is called; nothing else knows it.
NEEDS_TRANSFORMERS = {"llmfast/weights/check.py"}

TOP_LEVEL = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "llmfast", "kernels", "benchmarks", "tests"}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 100

PACKAGE_FILES = sorted((ROOT / "llmfast").rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))
BENCHMARK_FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
SOURCES = [*PACKAGE_FILES, *KERNEL_FILES, *BENCHMARK_FILES]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
each_kernel = pytest.mark.parametrize("path", KERNEL_FILES, ids=name_of)
each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def package_of(path: Path) -> list[str]:
    """The dotted parts of the package that relative imports in `path` start from."""
    return list(path.relative_to(ROOT).parent.parts)


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted target) of every import in `tree`, wherever it stands; a `from` gives target.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join((*target, alias.name))) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def unit_of(path: Path) -> str:
    """The package or module of llmfast that a file belongs to; "" for llmfast/__init__.py."""
    first = path.relative_to(ROOT / "llmfast").parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def violations(source: str, path: Path) -> list[str]:
    """Every import of `source`, as if it stood in `path`, that its floor does not allow."""
    unit, found = unit_of(path), []
    floor = FLOORS[unit] if unit else FACADE_FLOOR
    for line, target in imports(ast.parse(source), package_of(path)):
        top, *rest = target.split(".")
        if top != "llmfast" or rest == ["__version__"]:  # the version is all that the facade itself holds
            continue
        imported = rest[0] if rest else ""
        if unit and imported == unit:
            continue
        if imported == "kernels" or imported not in FLOORS or FLOORS[imported] >= floor:
            found.append(f"{name_of(path)}:{line} imports {target}")
    return found


@each_module
def test_modules_import_lower_floors_and_their_own_package(path: Path) -> None:
    assert unit_of(path) in {"", *FLOORS}, f"{name_of(path)} has no floor: add it to FLOORS"
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..inference import generate",
        "from .. import inference",
        "import llmfast.inference",
        "from llmfast.inference.sampling import sample",
        "from llmfast import inference",
        "from .. import GPT",
        "from ..tokenizers import BPE",
        "from ..kernels import softmax",
        "def f():\n    from ..training import train",
        "if TYPE_CHECKING:\n    from ..cli import main",
        "import importlib\nimportlib.import_module('llmfast.cli.main')",
    ],
)
def test_an_import_upwards_or_sideways_is_seen(source: str) -> None:
    """The rule above sees each way of writing an import; this is a module of `models`."""
    assert len(violations(source, ROOT / "llmfast/models/gpt.py")) == 1


@each_kernel
def test_kernels_import_torch_triton_and_themselves(path: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names, "kernels"}
    assert [t for _, t in imports(parse(path), ["kernels"]) if t.split(".")[0] not in allowed] == []
    absolute = [n.lineno for n in ast.walk(parse(path)) if isinstance(n, ast.ImportFrom) and n.module == "kernels"]
    assert absolute == [], "kernels import one another as `from ._common import ...`: their package has two names"


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "environment.py"], ids=name_of)
def test_only_environment_touches_environment_variables(path: Path) -> None:
    lines = [
        node.lineno
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {a.name for a in node.names})
    ]
    assert lines == [], f"{name_of(path)} reads or writes environment variables; llmfast/environment.py does that"


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


@each_module
def test_no_transformers_and_no_triton_at_import(path: Path) -> None:
    tree = parse(path)
    at_import = ast.Module([n for n in outside_functions(tree) if isinstance(n, ast.Import | ast.ImportFrom)], [])
    where = at_import if name_of(path) in NEEDS_TRANSFORMERS else tree
    if unit_of(path) != "integrations":
        assert [t for _, t in imports(where, package_of(path)) if t.split(".")[0] == "transformers"] == []
    assert [t for _, t in imports(at_import, package_of(path)) if t.split(".")[0] == "triton"] == []


@each_source
def test_files_and_functions_stay_short(path: Path) -> None:
    assert path.name != "utils.py", "a file is named after what it holds"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_top_level_is_fixed() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name for file in listed if not (name := file.split("/")[0]).startswith(".")}
    assert found == TOP_LEVEL
