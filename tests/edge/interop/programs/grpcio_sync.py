"""Calls a server by grpcio's synchronous client."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import calls
import grpc
from calls import task


def infer_of(channel: grpc.Channel) -> Any:
    return channel.unary_unary(
        calls.INFER, calls.InferRequest.SerializeToString, calls.InferReply.FromString
    )


def stream_of(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        calls.STREAM_INFER, calls.InferRequest.SerializeToString, calls.StreamReply.FromString
    )


def check(channel: grpc.Channel) -> None:
    """Come back with the channel connected and every earlier call of it seen by the server."""
    channel.unary_unary(calls.CHECK)(b"", timeout=60)


def watch(channel: grpc.Channel, timeout_s: float) -> Any:
    call = channel.unary_stream(
        calls.WATCH, calls.HealthRequest.SerializeToString, calls.HealthReply.FromString
    )
    return call(calls.HealthRequest(service="colors"), timeout=timeout_s)


def code_of(call: Callable[[], object]) -> int:
    try:
        call()
    except grpc.RpcError as error:
        return error.code().value[0]
    return 0


def unary(channel: grpc.Channel) -> object:
    binary = bytes(range(256))
    metadata = [("x-trace-bin", binary), ("x-note", "plain text")]
    return calls.answer(infer_of(channel)(calls.infer_request(), metadata=metadata, timeout=60))


def gzip(channel: grpc.Channel) -> object:
    call = infer_of(channel)
    return calls.answer(call(calls.infer_request(), compression=grpc.Compression.Gzip, timeout=60))


def large(channel: grpc.Channel) -> object:
    reply = infer_of(channel)(calls.large_request(), timeout=60)
    return len(reply.raw_output_contents[0])


def oversized(channel: grpc.Channel) -> object:
    return code_of(lambda: infer_of(channel)(calls.oversized_request(), timeout=60))


def error(channel: grpc.Channel) -> object:
    try:
        infer_of(channel)(calls.infer_request(model=task.unknown_model), timeout=60)
    except grpc.RpcError as caught:
        return [caught.code().value[0], caught.details()]


def stream(channel: grpc.Channel) -> object:
    replies = list(stream_of(channel)(calls.stream_requests(), timeout=60))
    return calls.stream_answers(replies)


def watched(channel: grpc.Channel) -> object:
    call = watch(channel, 60)
    first = next(call).status
    call.cancel()
    return first


def deadline(channel: grpc.Channel) -> object:
    return code_of(lambda: list(watch(channel, 0.3)))


def cancel(channel: grpc.Channel) -> object:
    check(channel)
    call = infer_of(channel).future(calls.infer_request(), timeout=60)
    check(channel)
    call.cancel()
    return call.code().value[0]


def pushback(channel: grpc.Channel) -> object:
    check(channel)
    first = infer_of(channel).future(calls.infer_request(), timeout=60)
    check(channel)
    try:
        infer_of(channel)(calls.infer_request(), timeout=60)
    except grpc.RpcError as error:
        first.result()
        return [error.code().value[0], calls.pushback_in(error.trailing_metadata())]


def secure(channel: grpc.Channel) -> object:
    credentials = grpc.ssl_channel_credentials(*calls.tls_files())
    with grpc.secure_channel(task.secure, credentials) as own:
        return calls.answer(infer_of(own)(calls.infer_request(), timeout=60))


def reload(channel: grpc.Channel) -> object:
    versions: Counter[str] = Counter()
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            version = infer_of(channel)(calls.infer_request(), timeout=60).model_version
            calls.count(versions, version)
            if version == task.until_version:
                done.set()

    failures = []

    def attempt() -> None:
        try:
            call()
        except grpc.RpcError as error:
            failures.append(str(error))
            done.set()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"versions": versions, "failures": failures}


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


def main() -> None:
    with (
        grpc.insecure_channel(task.address) as channel,
        grpc.insecure_channel(task.waiting) as slow,
    ):
        if task.until_version:
            calls.report({"reload": reload(channel)})
            return
        outcomes = {}
        for call in CALLS:
            opened = slow if call in (cancel, pushback) else channel
            try:
                outcomes[call.__name__] = call(opened)
            except Exception:
                outcomes[call.__name__] = calls.unexpected()
        calls.report(outcomes)


if __name__ == "__main__":
    main()
