"""Calls a server by grpcio's asynchronous client."""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import calls
import grpc
from calls import task


def infer_of(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        calls.INFER, calls.InferRequest.SerializeToString, calls.InferReply.FromString
    )


async def check(channel: grpc.aio.Channel) -> None:
    """Come back with the channel connected and every earlier call of it seen by the server."""
    await channel.unary_unary(calls.CHECK)(b"", timeout=60)


def watch(channel: grpc.aio.Channel, timeout_s: float) -> Any:
    call = channel.unary_stream(
        calls.WATCH, calls.HealthRequest.SerializeToString, calls.HealthReply.FromString
    )
    return call(calls.HealthRequest(service="colors"), timeout=timeout_s)


async def code_of(call: Awaitable[object]) -> int:
    try:
        await call
    except grpc.RpcError as error:
        return error.code().value[0]
    return 0


async def unary(channel: grpc.aio.Channel) -> object:
    metadata = [("x-trace-bin", bytes(range(256))), ("x-note", "plain text")]
    call = infer_of(channel)(calls.infer_request(), metadata=metadata, timeout=60)
    return calls.answer(await call)


async def gzip(channel: grpc.aio.Channel) -> object:
    call = infer_of(channel)
    compression = grpc.Compression.Gzip
    return calls.answer(await call(calls.infer_request(), compression=compression, timeout=60))


async def large(channel: grpc.aio.Channel) -> object:
    reply = await infer_of(channel)(calls.large_request(), timeout=60)
    return len(reply.raw_output_contents[0])


async def oversized(channel: grpc.aio.Channel) -> object:
    return await code_of(infer_of(channel)(calls.oversized_request(), timeout=60))


async def error(channel: grpc.aio.Channel) -> object:
    try:
        await infer_of(channel)(calls.infer_request(model=task.unknown_model), timeout=60)
    except grpc.RpcError as caught:
        return [caught.code().value[0], caught.details()]


async def stream(channel: grpc.aio.Channel) -> object:
    call = channel.stream_stream(
        calls.STREAM_INFER, calls.InferRequest.SerializeToString, calls.StreamReply.FromString
    )
    return calls.stream_answers([reply async for reply in call(calls.stream_requests())])


async def watched(channel: grpc.aio.Channel) -> object:
    call = watch(channel, 60)
    first = (await call.read()).status
    call.cancel()
    return first


async def deadline(channel: grpc.aio.Channel) -> object:
    async def read_all() -> None:
        async for _ in watch(channel, 0.3):
            pass

    return await code_of(read_all())


async def cancel(channel: grpc.aio.Channel) -> object:
    await check(channel)
    call = infer_of(channel)(calls.infer_request(), timeout=60)
    # The call is sent by a task of its own.
    await asyncio.sleep(0)
    await check(channel)
    call.cancel()
    return (await call.code()).value[0]


async def pushback(channel: grpc.aio.Channel) -> object:
    await check(channel)
    first = infer_of(channel)(calls.infer_request(), timeout=60)
    await asyncio.sleep(0)
    await check(channel)
    try:
        await infer_of(channel)(calls.infer_request(), timeout=60)
    except grpc.RpcError as error:
        await first
        return [error.code().value[0], calls.pushback_in(error.trailing_metadata())]


async def secure(channel: grpc.aio.Channel) -> object:
    credentials = grpc.ssl_channel_credentials(*calls.tls_files())
    async with grpc.aio.secure_channel(task.secure, credentials) as own:
        return calls.answer(await infer_of(own)(calls.infer_request(), timeout=60))


async def reload(channel: grpc.aio.Channel) -> object:
    versions: Counter[str] = Counter()

    async def call() -> None:
        while task.until_version not in versions:
            reply = await infer_of(channel)(calls.infer_request(), timeout=60)
            calls.count(versions, reply.model_version)

    ends = await asyncio.gather(*(call() for _ in range(8)), return_exceptions=True)
    return {"versions": versions, "failures": [str(end) for end in ends if end]}


CALLS = (
    unary,
    gzip,
    large,
    oversized,
    error,
    stream,
    watched,
    deadline,
    cancel,
    pushback,
    secure,
)


async def main() -> None:
    async with (
        grpc.aio.insecure_channel(task.address) as channel,
        grpc.aio.insecure_channel(task.waiting) as slow,
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
