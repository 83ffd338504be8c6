"""nghttp and h2load, the programs of the nghttp2 library, as gRPC callers that show raw fields."""

import re
import subprocess
from pathlib import Path

import pytest

from convoy.oip.v2 import inference_pb2 as pb
from tests.edge.interop.clients import PIXELS
from tests.needs import needs_program

GRPC = ("-H", ":method: POST", "-H", "content-type: application/grpc", "-H", "te: trailers")
CHECK = "/grpc.health.v1.Health/Check"
EMPTY_MESSAGE = bytes(5)

pytestmark = [needs_program(program, "nghttp2-client") for program in ("nghttp", "h2load")]


@pytest.fixture
def body(tmp_path) -> Path:
    """A file with a request's body: an empty message, unless a test writes another."""
    path = tmp_path / "body"
    path.write_bytes(EMPTY_MESSAGE)
    return path


def fields_of(url: str, body: Path, *options: str) -> dict[str, str]:
    """Make one call with nghttp and return the fields that the server sent, trailers included."""
    command = ["nghttp", "-v", "-n", *GRPC, "-d", str(body), *options, url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    return dict(re.findall(r"recv \(stream_id=\d+\) (:?[^:\s]+): (.*)", plain))


def test_a_reply_names_the_encodings_that_a_caller_may_use(edge, body):
    fields = fields_of(f"http://{edge.address}{CHECK}", body)
    assert (fields[":status"], fields["grpc-status"]) == ("200", "0")
    assert fields["content-type"].startswith("application/grpc")
    offered = {each.strip() for each in fields["grpc-accept-encoding"].split(",")}
    assert {"identity", "gzip", "deflate"} <= offered


def test_the_server_ends_a_call_at_its_deadline(edge, body):
    # nghttp knows nothing of deadlines: it waits until the server ends the stream.
    url = f"http://{edge.address}/grpc.health.v1.Health/Watch"
    fields = fields_of(url, body, "-H", "grpc-timeout: 300m")
    assert fields["grpc-status"] == "4"


def test_mutual_tls(servers, body):
    targets = servers.targets
    options = ("--cert", str(targets.certificate), "--key", str(targets.key))
    fields = fields_of(f"https://{targets.secure}{CHECK}", body, *options)
    assert fields["grpc-status"] == "0"


def test_h2load_gets_every_call_answered(edge, body):
    request = pb.ModelInferRequest(model_name="colors", raw_input_contents=[PIXELS.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=PIXELS.shape)
    message = request.SerializeToString()
    body.write_bytes(bytes(1) + len(message).to_bytes(4, "big") + message)
    before = edge.metric("convoy_outcomes_total", reason="ok")
    url = f"http://{edge.address}/inference.GRPCInferenceService/ModelInfer"
    result = subprocess.run(
        ["h2load", "-n2000", "-c4", "-m16", *GRPC, "-d", str(body), url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in result.stdout
    # A front end reports what it counted once a second.
    edge.wait_for_metric("convoy_outcomes_total", before + 2000, reason="ok")
    assert edge.metric("convoy_outcomes_total", reason="ok") == before + 2000
