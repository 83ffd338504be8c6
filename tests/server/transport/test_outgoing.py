"""What goes to a peer, gathered."""

import asyncio

import pytest

from server.transport.outgoing import Outgoing


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, buffered_bytes: int = 0) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = self.closed = False
        self._buffered_bytes = buffered_bytes

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return self._buffered_bytes

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def transport() -> Transport:
    return Transport()


async def test_what_is_due_together_leaves_in_one_write(transport):
    out = Outgoing(transport, max_unsent_bytes=100)
    out.write(b"one ")
    out.write(b"two")
    assert transport.written == []
    await asyncio.sleep(0)
    assert transport.written == [b"one two"]
    out.write(b"three")
    await asyncio.sleep(0)
    assert transport.written == [b"one two", b"three"]


async def test_closing_sends_what_was_gathered_before(transport):
    out = Outgoing(transport, max_unsent_bytes=100)
    out.write(b"goodbye")
    out.close()
    out.write(b"too late")
    await asyncio.sleep(0)
    assert (transport.written, transport.closed) == ([b"goodbye"], True)


async def test_a_peer_that_asks_and_does_not_listen_is_disconnected():
    transport = Transport(buffered_bytes=101)
    out = Outgoing(transport, max_unsent_bytes=100)
    out.write(b"more")
    await asyncio.sleep(0)
    assert (transport.written, transport.aborted) == ([], True)
