"""The library and the load generator against another server of the Open Inference Protocol.

MLServer wants an environment of its own; TEST_MLSERVER names its `mlserver` command:

    uv venv /tmp/mlserver && uv pip install --python /tmp/mlserver/bin/python mlserver
    TEST_MLSERVER=/tmp/mlserver/bin/mlserver pytest tests/clients/test_foreign_server.py
"""

import json
import os
import socket
import subprocess
import time

import numpy as np
import pytest

from convoy.client import (
    AsyncClient,
    Client,
    ClientError,
    Health,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
)
from tests.processes import run_module

MLSERVER = os.environ.get("TEST_MLSERVER", "")
pytestmark = pytest.mark.skipif(not MLSERVER, reason="TEST_MLSERVER names no mlserver")

RUNTIME = """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Sums(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        sums = x.reshape(len(x), -1).sum(1, keepdims=True).astype("float32")
        outputs = [NumpyCodec.encode_output("sums", sums), NumpyCodec.encode_output("same", x)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory):
    """The gRPC address of an MLServer process with a model `sums`."""
    root = tmp_path_factory.mktemp("mlserver")
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "metrics_dir": str(root), **ports}
    (root / "settings.json").write_text(json.dumps(settings))
    (root / "sums.py").write_text(RUNTIME)
    (root / "sums").mkdir()
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8]}]
    model = {"name": "sums", "implementation": "sums.Sums", "inputs": inputs}
    model["parameters"] = {"version": "v7"}
    (root / "sums" / "model-settings.json").write_text(json.dumps(model))
    address = f"127.0.0.1:{ports['grpc_port']}"
    with subprocess.Popen(
        [MLSERVER, "start", str(root)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until_ready(address)
            yield address
        finally:
            process.terminate()


def wait_until_ready(address):
    with Client(address, timeout_s=5) as client:
        for _ in range(100):
            try:
                if client.health("sums").ready:
                    return
            except ClientError:
                pass
            time.sleep(0.5)
    raise RuntimeError("MLServer did not get ready")


@pytest.mark.parametrize("code", ["f4", "f8", "i8", "i4", "u1", "?"])
def test_tensors_round_trip(mlserver, code):
    array = (np.random.default_rng(0).random((4, 3, 8)) * 2).astype(code)
    with Client(mlserver) as client:
        answer = client.infer("sums", {"x": array})
    assert (answer.model, answer.version) == ("sums", "v7")
    assert answer.outputs["same"].dtype == array.dtype
    np.testing.assert_array_equal(answer.outputs["same"], array)
    np.testing.assert_allclose(answer.outputs["sums"][:, 0], array.sum((1, 2)), rtol=1e-5)


async def test_health_and_asyncio(mlserver):
    async with AsyncClient(mlserver) as client:
        assert await client.health() == await client.health("sums") == Health(True, True)
        answer = await client.infer("sums", {"x": np.ones((2, 3, 8), np.float32)})
    assert list(answer.outputs["sums"][:, 0]) == [24, 24]


def test_errors_have_their_classes(mlserver):
    with Client(mlserver) as client:
        with pytest.raises(ModelNotFoundError):
            client.infer("nobody", {"x": np.ones((2, 3, 8), np.float32)})
        with pytest.raises(UnsupportedError):
            client.classify(b"x")
    with Client("127.0.0.1:1", timeout_s=1) as client, pytest.raises(UnavailableError):
        client.health()


@pytest.mark.parametrize("load", [("--concurrency", "4"), ("--rate", "50", "--slo-ms", "1000")])
def test_it_is_measured_by_the_same_tool(mlserver, load):
    flags = ("--protocol", "oip", "--model", "sums", "--payload", "raw", "--images", "2", "--json")
    result = run_module("convoy.client", "bench", *flags, *load, "--address", mlserver)
    assert result.returncode == 0, result.stderr
    (run,) = json.loads(result.stdout)["runs"]
    assert run["errors"] == {}
    assert run["completed"] == run["offered"] > 50
