"""Pictures over one ClassifyStream call, which is opened anew when it breaks."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

import grpc

from clients.backlog import Backlog
from clients.errors import ClientError, ServerError, UnavailableError, from_rpc_error
from clients.results import Classification
from convoy.v1 import classifier_pb2 as pb

Requests = Iterable[pb.ClassifyRequest | ClientError]
Outcome = Classification | ClientError
# A reply, or why there will be no more.
Event = pb.ClassifyStreamResponse | ServerError

_ENDED = "the server ended the stream"
_BROKE = "the stream broke"
# A write that fails makes gRPC for asyncio say this instead of why the call has ended.
_HIDDEN = "Internal error from Core"
# So the call after one that broke gives the server a while to refuse it before anything is written.
_LISTEN_S = 0.25


class _Call:
    """One call; a thread of its own reads the replies."""

    def __init__(self, open_call: Callable[..., grpc.Call]) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._outgoing: SimpleQueue[pb.ClassifyStreamRequest | None] = SimpleQueue()
        self._call = open_call(iter(self._outgoing.get, None))
        Thread(target=self._read, name="classify-stream", daemon=True).start()

    def send(self, request: pb.ClassifyStreamRequest) -> None:
        self._outgoing.put(request)

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for reply in self._call:
                self.events.put(reply)
        except grpc.RpcError as error:
            self.events.put(from_rpc_error(error))
        else:
            self.events.put(UnavailableError(_ENDED))


class _AioCall:
    """The same with tasks for threads; nothing is written for the first `listen_s`."""

    def __init__(self, open_call: Callable[[], grpc.aio.StreamStreamCall], listen_s: float) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._outgoing: asyncio.Queue[pb.ClassifyStreamRequest] = asyncio.Queue()
        self._call = open_call()
        self._reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write(listen_s))

    def send(self, request: pb.ClassifyStreamRequest) -> None:
        self._outgoing.put_nowait(request)

    def close(self) -> None:
        self._call.cancel()
        self._reader.cancel()
        self._writer.cancel()

    async def _read(self) -> None:
        try:
            async for reply in self._call:
                self.events.put_nowait(reply)
        except grpc.aio.AioRpcError as error:
            hidden = (error.details() or "").startswith(_HIDDEN)
            self.events.put_nowait(UnavailableError(_BROKE) if hidden else from_rpc_error(error))
        else:
            self.events.put_nowait(UnavailableError(_ENDED))

    async def _write(self, listen_s: float) -> None:
        if listen_s:
            await asyncio.wait([self._reader], timeout=listen_s)
        # The reader tells why a call has ended.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())


def classify_stream(
    requests: Requests, open_call: Callable[..., grpc.Call], backlog: Backlog
) -> Generator[Outcome]:
    """Sends requests and yields an outcome for each, in their order.

    Args:
        requests: Taken only as there is room in the backlog.
        open_call: Opens a call, given an iterator of messages.
        backlog: An empty one.

    Raises:
        ServerError: The server will not have the stream at all.
    """
    source, exhausted = iter(requests), False
    call: _Call | None = None
    try:
        while True:
            if backlog.has_room and not exhausted:
                exhausted = not _add_next(source, backlog)
            elif (outcome := backlog.take()) is not None:
                yield outcome
                continue
            elif backlog.is_empty:
                return
            for message in backlog.due():
                call = call or _Call(open_call)
                call.send(message)
            wait_s = 0.0 if backlog.has_room and not exhausted else backlog.wait_s()
            event = _next_event(call, wait_s)
            if isinstance(event, ServerError) and call:
                call.close()
                call = None
            _settle(backlog, event)
    finally:
        if call:
            call.close()


async def classify_stream_aio(
    requests: Requests, open_call: Callable[[], grpc.aio.StreamStreamCall], backlog: Backlog
) -> AsyncGenerator[Outcome]:
    """Does what `classify_stream` does, on an event loop."""
    source, exhausted = iter(requests), False
    call: _AioCall | None = None
    listen_s = 0.0
    try:
        while True:
            if backlog.has_room and not exhausted:
                exhausted = not _add_next(source, backlog)
            elif (outcome := backlog.take()) is not None:
                yield outcome
                continue
            elif backlog.is_empty:
                return
            for message in backlog.due():
                call = call or _AioCall(open_call, listen_s)
                call.send(message)
            wait_s = 0.0 if backlog.has_room and not exhausted else backlog.wait_s()
            event = await _next_event_aio(call, wait_s)
            if isinstance(event, ServerError) and call:
                call.close()
                call, listen_s = None, _LISTEN_S
            _settle(backlog, event)
    finally:
        if call:
            call.close()


def _add_next(source: Iterator[pb.ClassifyRequest | ClientError], backlog: Backlog) -> bool:
    """Adds one more request; tells whether there was one."""
    for request in source:
        backlog.add(request)
        return True
    return False


def _settle(backlog: Backlog, event: Event | None) -> None:
    if isinstance(event, ServerError):
        backlog.broke(event)
    elif event is not None:
        backlog.answered(event)
    backlog.expire()


def _next_event(call: _Call | None, wait_s: float) -> Event | None:
    if call is None:
        time.sleep(wait_s)
        return None
    try:
        return call.events.get(timeout=wait_s) if wait_s else call.events.get_nowait()
    except Empty:
        return None


async def _next_event_aio(call: _AioCall | None, wait_s: float) -> Event | None:
    if call is None:
        await asyncio.sleep(wait_s)
        return None
    try:
        if wait_s:
            return await asyncio.wait_for(call.events.get(), wait_s)
        await asyncio.sleep(0)  # lets the call's tasks run
        return call.events.get_nowait()
    except (TimeoutError, asyncio.QueueEmpty):
        return None
