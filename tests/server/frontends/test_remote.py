"""A front end's requests to the owner of the device."""

import asyncio
import gc
import mmap
import weakref

import numpy as np

from convoy.server.errors import DeadlineExceededError
from convoy.server.frontends.ipc import Arena, Infer, InferFailed
from convoy.server.frontends.served import RemoteRequests


async def test_a_rejected_request_leaves_nothing_to_the_garbage_collector():
    sent: list[object] = []
    requests = RemoteRequests(sent.append, Arena(mmap.mmap(-1, 1 << 20)))
    images = np.zeros((1, 2, 2, 3), np.uint8)
    pixels = weakref.ref(images)
    call = asyncio.ensure_future(requests.infer(1, images, 5.0, 0, ""))
    await asyncio.sleep(0)
    (asked,) = sent
    assert isinstance(asked, Infer)
    gc.disable()
    try:
        requests.answered(InferFailed(asked.number, DeadlineExceededError("late")))
        await asyncio.wait([call])
        assert isinstance(call.exception(), DeadlineExceededError)
        del images, call
        await asyncio.sleep(0)
        assert pixels() is None
    finally:
        gc.enable()
