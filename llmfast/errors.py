"""The errors llmfast raises on purpose. Each message is one line that names the value and the remedy."""


class LLMFastError(Exception):
    """Base class: the command line prints these as one line and exits with status 2."""


class InputError(LLMFastError, ValueError):
    """A value, file or option given by the caller cannot be used."""


class BackendError(LLMFastError, RuntimeError):
    """An explicitly requested kernel backend cannot run this call."""


class CheckpointError(LLMFastError, RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""
