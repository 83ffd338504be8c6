"""Traces reach a real collector on the loopback; devices without a driver are not an error."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.backends.device import count_cuda_devices
from convoy.server.metrics import devices
from convoy.server.metrics.devices import watch_devices
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import HEIGHT, WIDTH
from tests.server.test_process import infer_request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> list:
    scopes = [scope for resource in request.resource_spans for scope in resource.scope_spans]
    return [span for scope in scopes for span in scope.spans]


@pytest.fixture
def grpc_collector():
    """The same by gRPC: (url, queue of the spans that arrive)."""
    spans = Queue()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            for span in spans_of(request):
                spans.put(span)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(0).wait()


@pytest.fixture
def collector():
    """(url, queue of the spans that arrive)."""
    spans = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for span in spans_of(trace_service_pb2.ExportTraceServiceRequest.FromString(body)):
                spans.put(span)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


def open_metrics(server) -> str:
    """What Prometheus gets where it asks for exemplars."""
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    request = urllib.request.Request(f"{server.metrics}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read().decode()


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_a_call_is_a_span_in_its_callers_trace(publish, collector, transport):
    url, spans = collector
    flags = ["--device", "cpu", "--otlp-endpoint", url, *GRPC_FLAGS[transport]]
    with running_server(publish().parent.parent, *flags) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            traceparent = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
            stub.ModelInfer(infer_request(), metadata=traceparent)
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(pb.ModelInferRequest(model_name="cats"))
        # Front ends report from time to time.
        while f'trace_id="{TRACE}"' not in open_metrics(server):
            time.sleep(0.05)
        # Stopping sends what is left.
        assert server.stop() == 0
    good, bad = spans.get(timeout=30), spans.get(timeout=30)
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert good.name == "inference.GRPCInferenceService/ModelInfer"
    assert good.end_time_unix_nano > good.start_time_unix_nano
    assert good.status.code == 0
    assert bad.trace_id.hex() != TRACE
    assert bad.status.code == 2


def rest_infer(server, model, **headers) -> int:
    image = {"name": "image", "datatype": "UINT8", "shape": [1, HEIGHT, WIDTH, 3]}
    body = json.dumps({"inputs": [{**image, "data": [0] * (HEIGHT * WIDTH * 3)}]}).encode()
    url = f"{server.url}/v2/models/{model}/infer"
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def attributes(span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_rest_request_is_a_span_in_its_callers_trace(publish, collector):
    url, spans = collector
    flags = ["--device", "cpu", "--otlp-endpoint", url]
    with running_server(publish().parent.parent, *flags) as server:
        assert rest_infer(server, "colors", traceparent=f"00-{TRACE}-{PARENT}-01") == 200
        assert rest_infer(server, "cats") == 404
        assert server.stop() == 0
    good, bad = spans.get(timeout=30), spans.get(timeout=30)
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert good.name == bad.name == "POST /v2/models/{model}/infer"
    assert good.end_time_unix_nano > good.start_time_unix_nano
    assert attributes(good) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "url.path": "/v2/models/colors/infer",
        "http.response.status_code": 200,
    }
    assert bad.trace_id.hex() != TRACE
    # By OpenTelemetry's conventions a caller's mistake is not an error of the server's span.
    assert (attributes(bad)["http.response.status_code"], bad.status.code) == (404, 0)


def test_spans_are_sent_by_grpc(publish, grpc_collector):
    url, spans = grpc_collector
    flags = ["--device", "cpu", "--otlp-endpoint", url, "--otlp-protocol", "grpc"]
    with running_server(publish().parent.parent, *flags) as server:
        assert rest_infer(server, "colors") == 200
        assert rest_infer(server, "colors", traceparent=f"00-{TRACE}-{PARENT}-01") == 200
        # A bucket shows its latest.
        (line,) = [each for each in open_metrics(server).splitlines() if TRACE in each]
        assert line.startswith("convoy_request_duration_seconds_bucket{")
        assert 'method="RestInfer"' in line
        assert server.stop() == 0
    assert spans.get(timeout=30).trace_id.hex() != TRACE
    assert spans.get(timeout=30).trace_id.hex() == TRACE


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_dead_collector_does_not_affect_requests(publish, protocol):
    flags = ["--device", "cpu", "--otlp-endpoint", "http://127.0.0.1:1/v1/traces"]
    flags += ["--otlp-protocol", protocol]
    with running_server(publish().parent.parent, *flags) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelInfer(infer_request()).model_version == "1"
        assert server.stop() == 0


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_without_a_driver_there_are_no_device_metrics_and_no_error():
    registry = CollectorRegistry()
    assert not watch_devices(registry)
    assert b"convoy_device" not in generate_latest(registry)


def test_gpus_have_the_numbers_of_cuda(monkeypatch):
    """With CUDA_VISIBLE_DEVICES=1,0 and a third GPU hidden, say."""

    class NVMLError(Exception):
        __module__ = "pynvml"

    used = {"GPU-a": 10, "GPU-b": 20, "GPU-c": 30}

    def handle(uuid: str) -> str:
        if uuid not in used:
            raise NVMLError
        return uuid

    def utilization(uuid: str) -> SimpleNamespace:
        # As the slice of a device (MIG) answers.
        if uuid == "GPU-a":
            raise NVMLError
        return SimpleNamespace(gpu=used[uuid])

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda uuid: SimpleNamespace(used=used[uuid]),
        nvmlDeviceGetUtilizationRates=utilization,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(devices, "cuda_uuids", lambda: ["GPU-b", "GPU-gone", "GPU-a"])
    registry = CollectorRegistry()
    assert watch_devices(registry)
    text = generate_latest(registry).decode()
    assert 'convoy_device_memory_bytes{device="cuda:0"} 20.0' in text
    assert 'convoy_device_memory_bytes{device="cuda:2"} 10.0' in text
    assert 'convoy_device_utilization_ratio{device="cuda:0"} 0.2' in text
    assert text.count("convoy_device_memory_bytes{") == 2
    assert text.count("convoy_device_utilization_ratio{") == 1


@pytest.mark.skipif(count_cuda_devices() == 0, reason="this machine has no CUDA device")
def test_a_gpu_reports_its_memory_and_utilization():
    registry = CollectorRegistry()
    assert watch_devices(registry)
    labels = {"device": "cuda:0"}
    assert registry.get_sample_value("convoy_device_memory_bytes", labels) > 0
    assert 0 <= registry.get_sample_value("convoy_device_utilization_ratio", labels) <= 1
