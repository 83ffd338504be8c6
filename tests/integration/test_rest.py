"""REST of a real server process."""

import contextlib
import http.client
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.processes import ServerProcess, running_server

CHECK = Path(__file__).with_name("http_triton_check.py")


@pytest.fixture(scope="module")
def golden(repository):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return dict(samples)


def connect(server: ServerProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)


def call(
    server: ServerProcess, verb: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = connect(server)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(verb, path, body, named)
    reply = connection.getresponse()
    answer = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return answer


def infer_body(images: np.ndarray, **more: object) -> tuple[bytes, str]:
    size = images.size
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape}
    header = {"inputs": [{**tensor, "parameters": {"binary_data_size": size}}], **more}
    text = json.dumps(header).encode()
    return text + images.tobytes(), str(len(text))


def test_tritons_http_client(server, golden, tmp_path):
    np.save(tmp_path / "images.npy", golden["images"])
    command = [sys.executable, CHECK, urlsplit(server.url).netloc, "digits"]
    run = subprocess.run(
        [*command, tmp_path / "images.npy"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert (answers["live"], answers["ready"], answers["model_ready"]) == (True, True, True)
    assert answers["unknown_ready"] is False
    assert (answers["platform"], answers["id"]) == ("onnx_onnxv1", "seven")
    assert {"binary_tensor_data", "classification"} <= set(answers["extensions"])
    for kind in ("logits_True", "logits_False", "all_json"):
        np.testing.assert_allclose(answers[kind], golden["logits"], atol=1e-3)
    best = golden["logits"].argmax(axis=1)
    assert [int(text.split(":")[1]) for text in answers["classes"]] == best.tolist()
    assert answers["error"][0] == "404"
    assert "expected one of digits, got 'unknown'" in answers["error"][1]


def test_an_image_file_is_decoded_and_its_stages_are_reported(server, golden):
    end = int(golden["encoded_offsets"][1])
    file = golden["encoded"][:end].tobytes()
    raw = len(file).to_bytes(4, "little") + file
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    header = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}],
    }
    text = json.dumps(header).encode()
    status, headers, body = call(
        server,
        "POST",
        "/v2/models/digits/versions/1/infer",
        text + raw,
        Inference_Header_Content_Length=str(len(text)),
    )
    assert status == 200
    (element,) = json.loads(body)["outputs"][0]["data"]
    assert int(element.split(":")[1]) == golden["logits"][0].argmax()
    timing = {part.split(";")[0].strip(): part for part in headers["server-timing"].split(",")}
    assert float(timing["decode"].partition("dur=")[2]) > 0
    assert float(timing["inference"].partition("dur=")[2]) > 0
    assert timing["batch"].endswith("desc=1")


@pytest.mark.parametrize(
    ("path", "change", "status", "message"),
    [
        ("/v2/models/cats/infer", {}, 404, "got 'cats'"),
        ("/v2/models/digits/versions/9/infer", {}, 404, "got 9"),
        ("/v2/models/digits/versions/x/infer", {}, 400, "version: expected a whole number"),
        ("/v2/models/digits/infer", {"outputs": [{"name": "cats"}]}, 400, "got 'cats'"),
        ("/v2/models/digits/infer", {"parameters": {"triton_x": 1}}, 400, "triton_x"),
        ("/v2/models/digits/infer", {"parameters": {"timeout": "x"}}, 400, "timeout"),
        ("/v2/models/digits/infer", {"inputs": []}, 400, "raw tensors after the JSON"),
    ],
)
def test_mistakes_have_a_status_and_a_text(server, golden, path, change, status, message):
    body, length = infer_body(golden["images"][:1], **change)
    got, _, text = call(server, "POST", path, body, Inference_Header_Content_Length=length)
    assert got == status, text
    assert message in json.loads(text)["error"]


def test_a_body_over_the_limit_is_rejected_before_it_is_read(server):
    connection = connect(server)
    connection.putrequest("POST", "/v2/models/digits/infer")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 400
    assert "expected at most" in json.loads(reply.read())["error"]
    connection.close()


def test_a_timeout_ends_a_request_that_waits(repository, golden):
    flags = ("--device", "cpu", "--max-queue-delay-ms", "60000")
    with running_server(repository, *flags) as server:
        body, length = infer_body(golden["images"][:1], parameters={"timeout": 100_000})
        status, _, text = call(
            server, "POST", "/v2/models/digits/infer", body, Inference_Header_Content_Length=length
        )
        assert status == 504, text


def test_a_caller_that_disconnects_is_removed_from_the_queue(repository, golden):
    flags = ("--device", "cpu", "--max-queue-delay-ms", "60000")
    with running_server(repository, *flags) as server:
        body, length = infer_body(golden["images"][:1])
        connection = connect(server)
        connection.request(
            "POST",
            "/v2/models/digits/infer",
            body,
            {"Inference-Header-Content-Length": length},
        )

        def wait_for(images: int) -> None:
            for _ in range(1000):
                if server.metric("convoy_queued_images", model="digits") == images:
                    return
            pytest.fail(f"never {images} images in the queue")

        wait_for(1)
        assert server.metric("convoy_connections") == 1
        connection.close()
        wait_for(0)
        assert server.metric("convoy_connections") == 0
        assert server.metric("convoy_outcomes_total", model="digits", reason="cancelled") == 1


def test_connections_are_kept_and_shared_by_many_threads(server, golden):
    best = golden["logits"].argmax(axis=1)
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]

    def classify(numbers: range) -> list[int]:
        found = []
        with contextlib.closing(connect(server)) as connection:
            for number in numbers:
                body, length = infer_body(golden["images"][number % 16][None], outputs=outputs)
                headers = {"Inference-Header-Content-Length": length}
                connection.request("POST", "/v2/models/digits/infer", body, headers)
                reply = connection.getresponse()
                text = reply.read()
                end = int(reply.headers["inference-header-content-length"])
                found.append(int(np.frombuffer(text[end:], "<f4").argmax()))
        return found

    with ThreadPoolExecutor(8) as threads:
        runs = [range(start, start + 25) for start in range(8)]
        for run, found in zip(runs, threads.map(classify, runs), strict=True):
            assert found == [best[number % 16] for number in run]


def test_the_page_can_be_switched_off(repository):
    with running_server(repository, "--device", "cpu", "--no-ui") as server:
        assert call(server, "GET", "/")[0] == 404
        assert call(server, "GET", "/ui/state")[0] == 404
        assert call(server, "GET", "/v2/health/ready")[0] == 200
