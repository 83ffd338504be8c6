"""The stages of a request, from the server's metrics."""

import pytest

from convoy.client.bench import BenchError
from convoy.client.bench.latencies import Latencies
from convoy.client.bench.stages import MetricsPage, Stages

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


CONVOY = """\
# TYPE convoy_request_duration_seconds histogram
convoy_request_duration_seconds_sum{{method="Classify",code="OK",model="m",version="1"}} {request_s}
convoy_request_duration_seconds_count{{method="Classify",code="OK",model="m"}} {requests}
# TYPE convoy_decode_duration_seconds histogram
convoy_decode_duration_seconds_sum{{model="m",version="1"}} {decode_s}
convoy_decode_duration_seconds_count{{model="m",version="1"}} {decodes}
# TYPE convoy_queue_duration_seconds histogram
convoy_queue_duration_seconds_sum{{model="m",version="1"}} {queue_s}
convoy_queue_duration_seconds_count{{model="m",version="1"}} {requests}
# TYPE convoy_inference_duration_seconds histogram
convoy_inference_duration_seconds_sum{{model="m",version="1"}} {inference_s}
convoy_inference_duration_seconds_count{{model="m",version="1"}} {batches}
# TYPE convoy_batch_size_images histogram
convoy_batch_size_images_sum{{model="m",version="1"}} {requests}
convoy_batch_size_images_count{{model="m",version="1"}} {batches}
"""


@pytest.mark.parametrize(("decodes", "decode_s"), [(100, 0.028), (50, 0.014), (0, 0.0)])
def test_the_server_tells_how_long_it_decoded(tmp_path, decodes, decode_s):
    """Requests with pixels have no decoding, which lowers the mean over all."""
    file = tmp_path / "metrics"
    page = MetricsPage(file.as_uri(), "m", "Classify")
    pages = []
    values = {"requests": 100, "batches": 25, "request_s": 4.0, "queue_s": 0.2}
    values |= {"decodes": decodes, "decode_s": 0.028 * decodes, "inference_s": 0.05}
    for turn in range(2):
        file.write_text(CONVOY.format(**{name: turn * value for name, value in values.items()}))
        pages.append(page.read())
    # A sample of the replies counts only where the server does not tell.
    stages = Stages.of(Latencies.of([0.05]), Latencies.of([0.001]), *pages, 9.0)
    assert stages.decode_s == pytest.approx(decode_s)
    assert stages.server_s == pytest.approx(0.040 - decode_s - 0.002 - 0.002)


def test_a_metrics_page_without_stages_gives_none(tmp_path):
    file = tmp_path / "metrics"
    file.write_text("# TYPE up gauge\nup 1\n")
    page = MetricsPage(file.as_uri(), "", "Classify").read()
    assert Stages.of(Latencies.of([1]), Latencies.of([0]), page, page) is None


def test_an_unreachable_metrics_page_is_an_error():
    with pytest.raises(BenchError, match="--metrics: http://127"):
        MetricsPage("http://127.0.0.1:1/metrics", "", "Classify").read()
    with pytest.raises(BenchError, match="--metrics: nonsense"):
        MetricsPage("nonsense", "", "Classify").read()
