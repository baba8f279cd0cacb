"""The native tests need the library that they test."""

import pytest

from llmfast.errors import BackendError
from llmfast.native import library


@pytest.fixture(autouse=True)
def built() -> None:
    try:
        library.load("cpu")
    except BackendError as error:
        pytest.skip(str(error))
