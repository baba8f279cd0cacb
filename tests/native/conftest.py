"""The native tests need the library that they test."""

import pytest

from llmfast.errors import BackendError
from llmfast.native import library


@pytest.fixture(autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    try:
        library.load(getattr(request.module, "LIBRARY", "cpu"))
    except BackendError as error:
        pytest.skip(str(error))
