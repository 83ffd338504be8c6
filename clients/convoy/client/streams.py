"""Classification of many images over one ClassifyStream call, opened again when it breaks."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

import grpc

from convoy.client.errors import ClientError, ServerError, UnavailableError, from_rpc_error
from convoy.client.pending import PendingRequests
from convoy.client.results import Classification
from convoy.v1 import classifier_pb2 as pb

Request = pb.ClassifyRequest | ClientError
Outcome = Classification | ClientError
# A reply, or the reason why no more follow.
Event = pb.ClassifyStreamResponse | ServerError

_ENDED = "the server ended the stream"
_BROKE = "the stream broke"
# A write that fails makes gRPC for asyncio report this instead of the status of the call.
_HIDDEN = "Internal error from Core"
# A call that follows a broken one waits this long for a rejection before it writes anything.
_LISTEN_S = 0.25
# Python's waits take no infinite time-out.
_LONGEST_WAIT_S = 3600.0


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
            self.events.put(UnavailableError(_ENDED, grpc.StatusCode.UNAVAILABLE))


class _AioCall:
    """`_Call` with tasks instead of threads; it writes nothing for the first `listen_s`."""

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
            broke = UnavailableError(_BROKE, grpc.StatusCode.UNAVAILABLE)
            self.events.put_nowait(broke if hidden else from_rpc_error(error))
        else:
            self.events.put_nowait(UnavailableError(_ENDED, grpc.StatusCode.UNAVAILABLE))

    async def _write(self, listen_s: float) -> None:
        if listen_s:
            await asyncio.wait([self._reader], timeout=listen_s)
        # The reader reports why a call has ended.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())


def classify_stream(
    requests: Iterable[Request], open_call: Callable[..., grpc.Call], pending: PendingRequests
) -> Generator[Outcome]:
    """Send requests and yield an outcome for each, in their order.

    Args:
        requests: Taken only as `pending` has room.
        open_call: Opens a call, given an iterator of messages.
        pending: An empty window.

    Raises:
        ServerError: The server rejects the stream as a whole.
    """
    source, exhausted = iter(requests), False
    failure: Exception | None = None
    call: _Call | None = None
    try:
        while True:
            if pending.has_room and not exhausted:
                try:
                    pending.add(next(source))
                except StopIteration:
                    exhausted = True
                    continue
                except Exception as error:  # raised once the images before have their outcomes
                    exhausted, failure = True, error
                    continue
            elif (outcome := pending.take()) is not None:
                yield outcome
                continue
            elif pending.is_empty:
                break
            for message in pending.due():
                call = call or _Call(open_call)
                call.send(message)
            wait_s = 0.0 if pending.has_room and not exhausted else pending.wait_s()
            event = _next_event(call, wait_s)
            if isinstance(event, ServerError) and call:
                call.close()
                call = None
            _record(pending, event)
    finally:
        if call:
            call.close()
    if failure is not None:
        raise failure


async def classify_stream_aio(
    requests: AsyncGenerator[Request],
    open_call: Callable[[], grpc.aio.StreamStreamCall],
    pending: PendingRequests,
) -> AsyncGenerator[Outcome]:
    """Do what `classify_stream` does, on an event loop.

    It also yields answers while it awaits the next request.
    """
    source = _AioSource(requests)
    call: _AioCall | None = None
    listen_s = 0.0
    reply: asyncio.Task[Event] | None = None
    try:
        while True:
            if (outcome := pending.take()) is not None:
                yield outcome
                continue
            if source.exhausted and pending.is_empty:
                break
            source.advance(pending)
            for message in pending.due():
                call = call or _AioCall(open_call, listen_s)
                call.send(message)
            if call and reply is None:
                reply = asyncio.create_task(call.events.get())
            await _wait((source.task, reply), pending.wait_s())
            event: Event | None = None
            if reply and reply.done():
                event, reply = reply.result(), None
            if isinstance(event, ServerError) and call:
                call.close()
                call, listen_s = None, _LISTEN_S
            _record(pending, event)
    finally:
        for task in filter(None, (source.task, reply)):
            task.cancel()
        if call:
            call.close()
    if source.failure is not None:
        raise source.failure


class _AioSource:
    """The requests of a stream, one of which is awaited at a time.

    Attributes:
        task: The one that is awaited.
        exhausted: Whether there are no more.
        failure: What ended the requests, if they did not end by themselves.
    """

    def __init__(self, requests: AsyncGenerator[Request]) -> None:
        self.task: asyncio.Task[Request | None] | None = None
        self.exhausted = False
        self.failure: Exception | None = None
        self._requests = requests

    def advance(self, pending: PendingRequests) -> None:
        """Add the awaited request if it has come; await the next one if there is room for it."""
        if self.task and self.task.done():
            try:
                request = self.task.result()
            except Exception as error:  # raised once the images before have their outcomes
                request, self.failure = None, error
            self.task, self.exhausted = None, request is None
            if request is not None:
                pending.add(request)
        if self.task is None and pending.has_room and not self.exhausted:
            self.task = asyncio.create_task(self._next())

    async def _next(self) -> Request | None:
        return await anext(self._requests, None)


def _record(pending: PendingRequests, event: Event | None) -> None:
    if isinstance(event, ServerError):
        pending.broke(event)
    elif event is not None:
        pending.answered(event)
    pending.expire()


def _next_event(call: _Call | None, wait_s: float | None) -> Event | None:
    wait_s = _LONGEST_WAIT_S if wait_s is None else min(wait_s, _LONGEST_WAIT_S)
    if call is None:
        time.sleep(wait_s)
        return None
    try:
        return call.events.get(timeout=wait_s) if wait_s else call.events.get_nowait()
    except Empty:
        return None


async def _wait(
    tasks: tuple[asyncio.Task[Request | None] | None, asyncio.Task[Event] | None],
    wait_s: float | None,
) -> None:
    awaited = [task for task in tasks if task]
    if awaited:
        await asyncio.wait(awaited, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    elif wait_s:
        await asyncio.sleep(wait_s)
