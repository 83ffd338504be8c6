"""Calls a server by grpclib, which is pure Python on the h2 library."""

import asyncio
import ssl
from collections import Counter
from contextlib import asynccontextmanager
from typing import Any

import calls
from calls import task
from grpclib.client import Channel, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.exceptions import GRPCError


@asynccontextmanager
async def channel_to(address: str, **options: Any):
    host, port = address.rsplit(":", 1)
    async with Channel(host, int(port), **options) as channel:
        yield channel


def infer_of(channel: Channel) -> UnaryUnaryMethod:
    return UnaryUnaryMethod(channel, calls.INFER, calls.InferRequest, calls.InferReply)


async def check(channel: Channel) -> None:
    """Come back with the channel connected and every earlier call of it seen by the server."""
    method = UnaryUnaryMethod(channel, calls.CHECK, calls.HealthRequest, calls.HealthReply)
    await method(calls.HealthRequest(), timeout=60)


def watch_of(channel: Channel) -> UnaryStreamMethod:
    return UnaryStreamMethod(channel, calls.WATCH, calls.HealthRequest, calls.HealthReply)


async def unary(channel: Channel) -> object:
    metadata = {"x-trace-bin": bytes(range(256)), "x-note": "plain text"}
    return calls.answer(
        await infer_of(channel)(calls.infer_request(), metadata=metadata, timeout=60)
    )


async def large(channel: Channel) -> object:
    reply = await infer_of(channel)(calls.large_request(), timeout=60)
    return len(reply.raw_output_contents[0])


async def oversized(channel: Channel) -> object:
    try:
        await infer_of(channel)(calls.oversized_request(), timeout=60)
    except GRPCError as caught:
        return caught.status.value


async def error(channel: Channel) -> object:
    try:
        await infer_of(channel)(calls.infer_request(model=task.unknown_model), timeout=60)
    except GRPCError as caught:
        return [caught.status.value, caught.message]


async def stream(channel: Channel) -> object:
    method = StreamStreamMethod(channel, calls.STREAM_INFER, calls.InferRequest, calls.StreamReply)
    async with method.open(timeout=60) as call:
        for request in calls.stream_requests():
            await call.send_message(request)
        await call.end()
        return calls.stream_answers([reply async for reply in call])


async def watched(channel: Channel) -> object:
    async with watch_of(channel).open(timeout=60) as call:
        await call.send_message(calls.HealthRequest(service="colors"), end=True)
        first = await call.recv_message()
        await call.cancel()
        return first.status


async def deadline(channel: Channel) -> object:
    try:
        await watch_of(channel)(calls.HealthRequest(service="colors"), timeout=0.3)
    except TimeoutError:
        # The client's own clock ended the call.
        return 4
    except GRPCError as caught:
        # The server, which has the same deadline, was first.
        return caught.status.value


async def cancel(channel: Channel) -> object:
    async with infer_of(channel).open(timeout=60) as call:
        await call.send_message(calls.infer_request(), end=True)
        await check(channel)
        await call.cancel()
    return 1


async def pushback(channel: Channel) -> object:
    first = asyncio.create_task(infer_of(channel)(calls.infer_request(), timeout=60))
    await asyncio.sleep(0)
    await check(channel)
    try:
        async with infer_of(channel).open(timeout=60) as call:
            await call.send_message(calls.infer_request(), end=True)
            await call.recv_message()
    except GRPCError as caught:
        await first
        # The client hides trailers whose names begin with "grpc-".
        return [caught.status.value]


async def secure(channel: Channel) -> object:
    context = ssl.create_default_context(cafile=task.ca)
    context.load_cert_chain(task.certificate, task.key)
    context.set_alpn_protocols(["h2"])
    async with channel_to(task.secure, ssl=context) as own:
        return calls.answer(await infer_of(own)(calls.infer_request(), timeout=60))


async def reload(channel: Channel) -> object:
    versions: Counter[str] = Counter()

    async def call() -> None:
        while task.until_version not in versions:
            reply = await infer_of(channel)(calls.infer_request(), timeout=60)
            calls.count(versions, reply.model_version)

    ends = await asyncio.gather(*(call() for _ in range(8)), return_exceptions=True)
    return {"versions": versions, "failures": [str(end) for end in ends if end]}


CALLS = (unary, large, oversized, error, stream, watched, deadline, cancel, pushback, secure)


async def main() -> None:
    async with (
        channel_to(task.address) as channel,
        channel_to(task.waiting or task.address) as slow,
    ):
        if task.until_version:
            calls.report({"reload": await reload(channel)})
            return
        outcomes = {}
        for call in CALLS:
            opened = slow if call in (cancel, pushback) else channel
            try:
                outcomes[call.__name__] = await call(opened)
            except Exception:
                outcomes[call.__name__] = calls.unexpected()
        calls.report(outcomes)


if __name__ == "__main__":
    asyncio.run(main())
