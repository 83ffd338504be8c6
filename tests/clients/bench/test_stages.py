"""Where the time goes, by the server's own metrics."""

import pytest

from clients.bench import BenchError
from clients.bench.latencies import Latencies
from clients.bench.stages import MetricsPage, Stages

TRITON = """\
# TYPE nv_inference_request_success counter
nv_inference_request_success{{model="m",version="1"}} {requests}
nv_inference_request_success{{model="other",version="1"}} 1000
# TYPE nv_inference_count counter
nv_inference_count{{model="m",version="1"}} {requests}
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{{model="m",version="1"}} {batches}
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{{model="m",version="1"}} {request_us}
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{{model="m",version="1"}} {queue_us}
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{{model="m",version="1"}} {infer_us}
"""


def test_tritons_metrics_are_understood(tmp_path):
    file = tmp_path / "metrics"
    page = MetricsPage(file.as_uri(), "m", "ModelInfer")
    pages = []
    for turn in range(2):
        values = {
            "requests": 100,
            "batches": 25,
            "request_us": 4e5,
            "queue_us": 1e5,
            "infer_us": 2e5,
        }
        file.write_text(TRITON.format(**{name: turn * value for name, value in values.items()}))
        pages.append(page.read())
    stages = Stages.of(Latencies.of([0.010]), Latencies.of([0.001]), *pages)
    assert stages.client_s == pytest.approx(0.001, rel=0.01)
    assert stages.network_s == pytest.approx(0.005, rel=0.01)
    assert stages.queue_s == pytest.approx(0.001)
    assert stages.inference_s == pytest.approx(0.002)
    assert stages.server_s == pytest.approx(0.001)
    assert stages.batch_size == 4


def test_a_page_that_tells_nothing_gives_no_stages(tmp_path):
    file = tmp_path / "metrics"
    file.write_text("# TYPE up gauge\nup 1\n")
    page = MetricsPage(file.as_uri(), "", "Classify").read()
    assert Stages.of(Latencies.of([1]), Latencies.of([0]), page, page) is None


def test_a_page_that_cannot_be_had_is_an_error():
    with pytest.raises(BenchError, match="--metrics: http://127"):
        MetricsPage("http://127.0.0.1:1/metrics", "", "Classify").read()
    with pytest.raises(BenchError, match="--metrics: nonsense"):
        MetricsPage("nonsense", "", "Classify").read()
