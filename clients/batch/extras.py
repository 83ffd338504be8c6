"""Packages that come with an extra and not with the bare client."""

from collections.abc import Iterator
from contextlib import contextmanager

from clients.batch.errors import BatchError


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Says which extra to install where an import inside the block fails.

    Raises:
        BatchError: A package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise BatchError(
            f"{what} needs the package {error.name}: pip install 'convoy-serving[{extra}]'"
        ) from error
