"""What a batch job raises.

    ClientError
    └── BatchError         the job cannot start or continue; finished parts are kept
        ├── InputError     the input is missing, empty, changed, or not what its name says
        ├── OutputError    the table cannot be written, or was made by another command
        ├── VersionError   the model version's files cannot be trusted or run
        └── EngineError    the engine is not usable here, or no longer answers

An image that cannot be classified is none of these: it becomes a row with its error.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from convoy.client.errors import ClientError
from convoy.client.urls import without_secrets


class BatchError(ClientError):
    """A batch job cannot start or continue.

    Args:
        message: One line; users and passwords of URLs, and queries, are removed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class InputError(BatchError):
    """The input is missing, empty, changed, or not what its name says."""


class OutputError(BatchError):
    """The table cannot be written, or belongs to another job."""


class VersionError(BatchError):
    """The files of a model version cannot be trusted or run."""


class EngineError(BatchError):
    """The engine is not usable here, or no longer answers."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Say which extra to install where an import inside the block fails.

    Raises:
        BatchError: A package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise BatchError(
            f"{what} needs the package {error.name}: pip install 'convoy-serving[{extra}]'"
        ) from error
