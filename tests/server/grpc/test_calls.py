"""Calls by grpcio's client: every kind, every way a call can end."""

import asyncio
import subprocess

import grpc
import pytest

from convoy.server.security.tls import Tls, TlsFiles
from tests.server.grpc.conftest import MIB, RETRIES, Limits, listener_of


def method(name: str) -> str:
    return f"/test.Echo/{name}"


async def test_a_unary_call(channel):
    for size in (0, 1, 100, 16_384, 100_000, 5 * MIB):
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        assert await channel.unary_unary(method("Unary"))(message) == message


async def test_many_calls_at_once_get_their_own_answers(channel):
    call = channel.unary_unary(method("Unary"))
    sizes = [n * 37 % 40_000 for n in range(500)]
    answers = await asyncio.gather(*(call(b"%d" % n + bytes(s)) for n, s in enumerate(sizes)))
    assert answers == [b"%d" % n + bytes(size) for n, size in enumerate(sizes)]


async def test_replies_stream_in_order_and_past_the_windows(channel):
    replies = [reply async for reply in channel.unary_stream(method("Many"))(b"3000")]
    assert [int(reply[:5].split()[0]) for reply in replies] == list(range(3000))


async def test_requests_stream_past_the_windows(channel):
    async def requests():
        for number in range(400):
            yield bytes([number % 251]) * 20_000

    joined = await channel.stream_unary(method("Join"))(requests())
    assert len(joined) == 400 * 20_000
    assert joined[::20_000] == bytes(number % 251 for number in range(400))


async def test_both_sides_stream(channel):
    call = channel.stream_stream(method("Both"))()
    for number in range(100):
        await call.write(b"%d" % number)
        assert await call.read() == b"%d" % number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_handlers_status_arrives_with_its_text_and_metadata(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method("Abort"))(b"")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "voll: 100 % belegt überfüllt"
    trailing = dict(caught.value.trailing_metadata())
    # HTTP's own, beside a status without messages.
    assert trailing.pop("content-length", "0") == "0"
    assert trailing == {"grpc-retry-pushback-ms": "20", "detail-bin": b"\x00\xff"}


async def test_an_exception_ends_its_call_alone_and_keeps_its_text(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method("Fail"))(b"")
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in caught.value.details()
    assert await channel.unary_unary(method("Unary"))(b"on") == b"on"


async def test_unknown_methods_are_unimplemented_whatever_their_kind(channel):
    calls = [
        channel.unary_unary("/test.Echo/Nothing")(b""),
        channel.stream_unary("/other.Service/Unary")(),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_go_both_ways(channel):
    call = channel.unary_unary(method("Metadata"))(
        b"", metadata=(("letters", "b c"), ("raw-bin", b"\x00\x01\xff"))
    )
    sent = dict(eval(await call))
    assert (sent["letters"], sent["raw-bin"]) == ("b c", b"\x00\x01\xff")
    assert sent["user-agent"].startswith("grpc-python")
    assert "grpc-timeout" not in sent
    trailing = dict(await call.trailing_metadata())
    assert trailing["peer"].startswith("ipv4:127.0.0.1:")


async def test_the_deadline_is_passed_on_and_kept(channel, echo):
    remaining = channel.unary_unary(method("Remaining"))
    assert await remaining(b"") == b"None"
    # gRPC rounds a timeout up on its way.
    assert 50 < float(await remaining(b"", timeout=60)) < 62
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method("Wait"))(b"", timeout=2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(echo.left.wait(), 10)
    assert echo.running == 0


async def test_a_cancelled_call_cancels_its_handler(channel, echo):
    call = channel.unary_unary(method("Wait"))(b"")
    await asyncio.wait_for(echo.started.wait(), 10)
    call.cancel()
    await asyncio.wait_for(echo.left.wait(), 10)
    assert await channel.unary_unary(method("Unary"))(b"on") == b"on"


async def test_a_vanished_caller_cancels_its_handlers(port, echo):
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_unary(method("Wait"))(b"")
    await asyncio.wait_for(echo.started.wait(), 10)
    await channel.close(grace=None)
    await asyncio.wait_for(echo.left.wait(), 10)
    assert call.cancelled()


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests(port, compression):
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address, compression=compression) as channel:
        assert await channel.unary_unary(method("Unary"))(bytes(100_000)) == bytes(100_000)


class TestSmallLimits:
    @pytest.fixture
    def limits(self):
        return Limits(max_message_bytes=1000, max_streams=4)

    async def test_a_message_over_the_limit_is_rejected(self, channel):
        for size, compression in ((1001, None), (100_000, grpc.Compression.Gzip)):
            with pytest.raises(grpc.aio.AioRpcError, match="expected at most 1000 bytes") as caught:
                await channel.unary_unary(method("Unary"))(bytes(size), compression=compression)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(await channel.unary_unary(method("Unary"))(bytes(1000))) == 1000

    async def test_calls_beyond_the_limit_wait_at_the_caller(self, channel, echo):
        waiting = [channel.unary_unary(method("Wait"))(b"%d" % n) for n in range(10)]
        await asyncio.wait_for(echo.started.wait(), 10)
        assert echo.running <= 4
        echo.gate.set()
        assert await asyncio.gather(*waiting) == [b"%d" % n for n in range(10)]


async def test_draining_answers_what_is_under_way_and_rejects_the_rest(server, channel, echo):
    echo.expected = 5
    waiting = [channel.unary_unary(method("Wait"))(b"%d" % n) for n in range(5)]
    await asyncio.wait_for(echo.started.wait(), 10)
    stopping = asyncio.create_task(server.stop())

    async def call_until_rejected():
        # Calls that cross the announcement are still answered.
        while True:
            await channel.unary_unary(method("Unary"))(b"late")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_until_rejected()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    echo.gate.set()
    assert await asyncio.gather(*waiting) == [b"%d" % n for n in range(5)]
    await asyncio.wait_for(stopping, 10)


class TestShortDrain:
    @pytest.fixture
    def limits(self):
        return Limits(drain_timeout_s=0.05)

    async def test_after_the_grace_calls_are_ended(self, server, channel, echo):
        waiting = channel.unary_unary(method("Wait"))(b"")
        await asyncio.wait_for(echo.started.wait(), 10)
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_no_call_fails_when_a_server_hands_over_to_another(echo, limits, metrics):
    """Calls that a draining server did not look at are sent again."""
    first = listener_of(echo, limits, metrics)
    await first.start()
    port = first.port
    failed = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=RETRIES) as channel:
        call = channel.unary_unary(method("Unary"))

        async def keep_calling():
            for number in range(200):
                try:
                    assert await call(b"%d" % number, wait_for_ready=True) == b"%d" % number
                except grpc.aio.AioRpcError as error:
                    failed.append(error)

        calling = [asyncio.create_task(keep_calling()) for _ in range(8)]
        await asyncio.sleep(0.05)
        await first.stop()
        second = listener_of(echo, limits, metrics, port)
        await second.start()
        await asyncio.gather(*calling)
    await second.stop()
    assert failed == []


@pytest.fixture
def certificate(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    request += ["-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    request += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(request, check=True, capture_output=True)
    return certificate


async def test_tls(certificate, echo, limits, metrics):
    tls = Tls(TlsFiles(certificate, certificate.with_name("key.pem")))
    server = listener_of(echo, limits, metrics, tls=tls)
    await server.start()
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
        assert await channel.unary_unary(method("Unary"))(bytes(200_000)) == bytes(200_000)
    await server.stop()


async def test_a_burst_of_cancelled_calls_does_not_affect_the_others(channel, echo):
    """Below the limit that h2corn has for resets, 200 in 10 s on a connection."""
    echo.expected = 151
    calls = [channel.unary_unary(method("Wait"))(b"%d" % number) for number in range(151)]
    await asyncio.wait_for(echo.started.wait(), 30)
    for call in calls[1:]:
        call.cancel()
    echo.gate.set()
    assert await calls[0] == b"0"
