"""Without a GPU, Triton kernels run in Triton's CPU interpreter, which must be chosen before Triton is imported.

Workers of pytest-xdist share the processors: each with threads for all of them, tests take 2.5 times as long.
"""

import os

import pytest
import torch

from llmfast.errors import BackendError
from llmfast.native import library

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of processes that tests start


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whether an error is within its bound must not depend on the run."""
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the GPU if there is one, unless the backend that it is parametrized by runs elsewhere."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    needed: dict[str, tuple[str, library.Name]] = {"cpp": ("cpu", "cpu"), "cuda": ("cuda", "cuda")}
    if parameters.get("backend") not in needed:
        return here
    where, name = needed[parameters["backend"]]
    if where == "cuda" and here != "cuda":
        pytest.skip("needs a CUDA device")
    try:
        library.load(name)
    except BackendError as error:
        pytest.skip(str(error))
    return where


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
