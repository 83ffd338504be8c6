"""SIGTERM under load: accepted requests are answered, and nobody holds up the end."""

import contextlib
import http.client
import signal
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import HEIGHT, WIDTH
from tests.server.test_process import infer_request

DRAIN_S = 4.0
# What a loaded machine may take to end a process.
MARGIN_S = 15.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class Caller(threading.Thread):
    """Asks again and again until the server takes nothing more.

    Attributes:
        answered: Requests that were answered.
        rejected: Why the last one was not accepted.
        lost: What happened to accepted requests without an answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answered = 0
        self.rejected = ""
        self.lost: list[str] = []

    def run(self) -> None:
        while not self.rejected and not self.lost:
            self.ask()

    def ask(self) -> None:
        raise NotImplementedError


class GrpcCaller(Caller):
    def __init__(self, address: str, transport: str) -> None:
        super().__init__()
        self.rejections = ["connect", "draining", "Connection re"]
        if transport == "grpcio":
            # So the C core ends the calls that it has read and not handed to a servicer yet.
            self.rejections.append("CANCELLED: CANCELLED")
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options)
        self.stub = inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(self) -> None:
        try:
            self.stub.ModelInfer(infer_request(), timeout=60)
            self.answered += 1
        except grpc.RpcError as error:
            status = f"{error.code().name}: {error.details()}"
            accepted = not any(word in status for word in self.rejections)
            self.lost += [status] * accepted
            self.rejected = status


class RestCaller(Caller):
    """Opens a connection for each request, so that some open in the last moment."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        pixels = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8).ravel().tolist()
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, HEIGHT, WIDTH, 3]}
        self.body = str({"inputs": [{**tensor, "data": pixels}]}).replace("'", '"')

    def ask(self) -> None:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.request("POST", "/v2/models/colors/infer", self.body)
            except OSError as error:
                self.rejected = repr(error)
                return
            try:
                reply = connection.getresponse()
                reply.read()
            except OSError as error:
                # The kernel took the connection, the server has not: a reset without a byte.
                self.rejected = repr(error)
                if not isinstance(error, ConnectionResetError | http.client.RemoteDisconnected):
                    self.lost.append(repr(error))
                return
        if reply.status == 200:
            self.answered += 1
        elif reply.status == 503:
            self.rejected = "503"
        else:
            self.lost.append(str(reply.status))


def stuck_callers(address: str) -> list[socket.socket]:
    """Connections that hold on: silent, in the middle of a head, of a body, of a frame."""
    host, port = address.rsplit(":", 1)
    half_body = b"POST /v2/models/colors/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
    greetings = (b"", b"GET / HTTP", half_body, PREFACE, PREFACE + b"\0\0\x09\1")
    callers = []
    for greeting in greetings:
        caller = socket.create_connection((host, int(port)), timeout=60)
        caller.sendall(greeting)
        callers.append(caller)
    return callers


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_sigterm_under_load_loses_no_accepted_request(publish, transport):
    models = publish().parent.parent
    flags = ("--device", "cpu", "--drain-timeout-s", DRAIN_S, *GRPC_FLAGS[transport])
    rest = ("--rest-port", "0") if transport == "grpcio" else ()
    with running_server(models, *flags, *rest) as server:
        rest_address = server.url.removeprefix("http://")
        callers: list[Caller] = [GrpcCaller(server.address, transport) for _ in range(6)]
        callers += [RestCaller(rest_address) for _ in range(3)]
        stuck = [*stuck_callers(server.address), *stuck_callers(rest_address)]
        for caller in callers:
            caller.start()
        while not all(caller.answered >= 3 for caller in callers):
            assert not any(caller.rejected or caller.lost for caller in callers)
            time.sleep(0.01)
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=120) == 0
        took_s = time.monotonic() - began_s
        for caller in callers:
            caller.join()
        for each in stuck:
            each.close()
    assert [caller.lost for caller in callers] == [[]] * len(callers)
    assert took_s < DRAIN_S + MARGIN_S
