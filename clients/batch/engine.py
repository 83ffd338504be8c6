"""What every engine offers a job."""

from collections.abc import Generator, Mapping
from typing import Protocol

from clients.batch.inputs import Source
from clients.batch.rows import Row


class Engine(Protocol):
    """Turns the items of a source into rows."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What tells whether a resumed job gets the same predictions, as JSON's types."""

    def labels(self) -> list[str]:
        """The model's classes, in the order of its outputs.

        Raises:
            BatchError: There is no such model.
            ServerError: The server cannot be asked.
        """

    def predict(self, source: Source, start: int) -> Generator[list[Row]]:
        """Yields the rows of the items from number `start` on, in their order.

        An item that cannot be classified yields a row with its error. Items are taken as they are
        needed, a bounded number ahead.

        Raises:
            BatchError: The job cannot go on.
        """
