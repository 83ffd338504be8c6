"""From when to when a client may be used."""

import os

from clients.errors import LifetimeError


class Lifetime:
    """Begins when it is made, ends when it is closed, and does not cross a fork.

    gRPC keeps threads and sockets that a child process has not got: its calls would hang there.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._closed = False

    def close(self) -> None:
        """Ends it."""
        self._closed = True

    def check(self) -> None:
        """Lets a living client go on.

        Raises:
            LifetimeError: It was closed, or this process was forked after it was made.
        """
        if self._closed:
            raise LifetimeError("the client is closed")
        if os.getpid() != self._process:
            raise LifetimeError(
                "the client was made before this process was forked; make one in each process"
            )
