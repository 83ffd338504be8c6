"""Messages between two processes, here over a socket pair on one loop."""

import asyncio
import pickle
import socket

import pytest

from convoy.server.errors import DeadlineExceededError, OverloadedError
from convoy.server.frontends.ipc import Link


@pytest.fixture
async def ends():
    """Two links, each with what it received and the event of its loss."""
    loop = asyncio.get_running_loop()
    made = []
    for end in socket.socketpair():
        received, lost = asyncio.Queue(), asyncio.Event()
        link = Link(received.put_nowait, lost.set)
        await loop.create_unix_connection(lambda link=link: link, sock=end)
        made.append((link, received, lost))
    yield made
    for link, _, _ in made:
        link.close()


async def test_messages_arrive_whole_and_in_order_both_ways(ends):
    (first, at_first, _), (second, at_second, _) = ends
    large = b"x" * 1_000_000
    sent = [(number, large if number % 10 == 0 else b"") for number in range(100)]
    for message in sent:
        first.send(message)
        second.send(message)
    assert [await at_first.get() for _ in sent] == sent
    assert [await at_second.get() for _ in sent] == sent


async def test_what_was_sent_before_the_end_arrives_and_what_comes_after_it_is_lost(ends):
    (first, _, _), (second, received, lost) = ends
    first.send("last")
    first.close()
    await lost.wait()
    second.send("nobody")
    await asyncio.sleep(0)
    assert received.get_nowait() == "last"
    assert received.empty()


@pytest.mark.parametrize("error", [OverloadedError("full", 0.25), DeadlineExceededError("late")])
def test_errors_of_requests_survive_the_way(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
