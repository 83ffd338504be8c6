"""Traces reach a real collector on the loopback; devices without a driver are no error."""

import json
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from prometheus_client import CollectorRegistry, generate_latest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from server import device_metrics
from server.backends.devices import count_cuda_devices
from server.device_metrics import watch_devices
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import HEIGHT, WIDTH
from tests.server.test_process import infer_request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    """(url, queue of the spans that arrive)."""
    spans = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
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
    url = f"{server.http}/v2/models/{model}/infer"
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
        assert rest_infer(server, "colours", traceparent=f"00-{TRACE}-{PARENT}-01") == 200
        assert rest_infer(server, "cats") == 404
        assert server.stop() == 0
    good, bad = spans.get(timeout=30), spans.get(timeout=30)
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (TRACE, PARENT)
    assert good.name == bad.name == "POST /v2/models/{model}/infer"
    assert good.end_time_unix_nano > good.start_time_unix_nano
    assert attributes(good) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "url.path": "/v2/models/colours/infer",
        "http.response.status_code": 200,
    }
    assert bad.trace_id.hex() != TRACE
    # By OpenTelemetry's conventions what the caller did wrong is no error of the server's span.
    assert (attributes(bad)["http.response.status_code"], bad.status.code) == (404, 0)


def test_a_dead_collector_hurts_nobody(publish):
    flags = ["--device", "cpu", "--otlp-endpoint", "http://127.0.0.1:1/v1/traces"]
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


def test_gpus_are_told_by_the_numbers_that_cuda_has_for_them(monkeypatch):
    """With CUDA_VISIBLE_DEVICES=1,0 and a third GPU hidden, say."""

    class NVMLError(Exception):
        __module__ = "pynvml"

    used = {"GPU-a": 10, "GPU-b": 20, "GPU-c": 30}

    def handle(uuid: str) -> str:
        if uuid not in used:
            raise NVMLError
        return uuid

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda uuid: SimpleNamespace(used=used[uuid]),
        nvmlDeviceGetUtilizationRates=lambda uuid: SimpleNamespace(gpu=used[uuid]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(device_metrics, "cuda_uuids", lambda: ["GPU-b", "GPU-gone", "GPU-a"])
    registry = CollectorRegistry()
    assert watch_devices(registry)
    text = generate_latest(registry).decode()
    assert 'convoy_device_memory_bytes{device="cuda:0"} 20.0' in text
    assert 'convoy_device_memory_bytes{device="cuda:2"} 10.0' in text
    assert 'convoy_device_utilisation_ratio{device="cuda:0"} 0.2' in text
    assert text.count("convoy_device_memory_bytes{") == 2


@pytest.mark.skipif(count_cuda_devices() == 0, reason="this machine has no CUDA device")
def test_a_gpu_tells_its_memory_and_utilisation():
    registry = CollectorRegistry()
    assert watch_devices(registry)
    labels = {"device": "cuda:0"}
    assert registry.get_sample_value("convoy_device_memory_bytes", labels) > 0
    assert 0 <= registry.get_sample_value("convoy_device_utilisation_ratio", labels) <= 1
