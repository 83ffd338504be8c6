"""Serving on CUDA: the right device, the right answers, memory that comes back."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.gpu.conftest import publish_again
from tests.processes import ServerProcess, running_server

# Of float32 on either device: CUDA must not round factors to TF32.
TOLERANCE = {"cuda": 1e-3, "cpu": 1e-3}
PROVIDERS = {
    ("onnx", "cuda"): "CUDAExecutionProvider",
    ("onnx", "cpu"): "CPUExecutionProvider",
    ("torchscript", "cuda"): "torch-cuda",
    ("torchscript", "cpu"): "torch-cpu",
}
# Takes device memory until little is left, says so, and holds it until its input ends.
HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def infer(server: ServerProcess, images: np.ndarray) -> np.ndarray:
    request = pb.ModelInferRequest(
        model_name="digits",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
        outputs=[{"name": "logits"}],
        raw_input_contents=[images.tobytes()],
    )
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        reply = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    return np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(len(images), -1)


def metadata(server: ServerProcess) -> pb.ModelMetadataResponse:
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelMetadata(pb.ModelMetadataRequest(name="digits"), timeout=60)


def wait_for_version(server: ServerProcess, version: str) -> None:
    deadline_s = time.monotonic() + 60
    while metadata(server).versions[-1] != version:
        assert time.monotonic() < deadline_s, server.events


@pytest.mark.parametrize(
    ("backend", "flags"), [("onnx", []), ("onnx", ["--cuda-graphs"]), ("torchscript", [])]
)
def test_the_requested_device_runs_and_agrees(models, golden, device, backend, flags):
    with running_server(models, "--device", device, "--backend", backend, *flags) as server:
        properties = dict(metadata(server).properties)
        assert properties["provider"] == PROVIDERS[backend, device]
        assert properties["device"].startswith(device)
        for size in (1, 2, 7, 16):
            difference = np.abs(infer(server, golden["images"][:size]) - golden["logits"][:size])
            assert difference.max() <= TOLERANCE[device]


def test_every_device_answers_behind_one_queue(models, golden, device):
    every = "cpu,cpu" if device == "cpu" else "cuda:all"
    with (
        running_server(models, "--device", every, "--instances", "2") as server,
        ThreadPoolExecutor(16) as callers,
    ):
        assert dict(metadata(server).properties)["device"].startswith(device)
        for logits in callers.map(infer, [server] * 64, [golden["images"]] * 64):
            assert np.abs(logits - golden["logits"]).max() <= TOLERANCE[device]


def test_a_version_whose_golden_samples_fail_there_is_rejected(models, golden, device):
    with running_server(models, "--device", device, "--poll-s", "0.2") as server:

        def shift(samples: dict[str, np.ndarray]) -> None:
            samples["logits"] = samples["logits"] + 1

        publish_again(models, 2, shift)
        deadline_s = time.monotonic() + 60
        while not any(event["event"] == "version rejected" for event in server.events):
            assert time.monotonic() < deadline_s, server.events
            infer(server, golden["images"])
        assert metadata(server).versions[-1] == "1"


def test_swaps_under_load_give_all_memory_back(models, golden, cuda):
    import torch

    with (
        running_server(models, "--device", cuda, "--poll-s", "0.2") as server,
        ThreadPoolExecutor(4) as callers,
    ):
        publish_again(models, 2)
        wait_for_version(server, "2")
        free_bytes, _ = torch.cuda.mem_get_info()
        for version in range(3, 9):
            publish_again(models, version)
            while metadata(server).versions[-1] != str(version):
                list(callers.map(infer, [server] * 8, [golden["images"]] * 8))
        # One model of this size takes a few MiB; six that stayed would be seen.
        assert free_bytes - torch.cuda.mem_get_info()[0] < 64 * 1024 * 1024


def test_a_device_without_memory_is_survived(models, golden, cuda):
    flags = ("--device", cuda, "--max-batch-size", "4096", "--max-message-mib", "64")
    with running_server(models, *flags) as server:
        command = [sys.executable, "-c", HOG, str(96 * 1024 * 1024)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as hog:
            assert hog.stdout
            assert hog.stdout.readline() == "held\n"
            many = np.repeat(golden["images"], 128, axis=0)  # [2048, 32, 32, 3] uint8
            logits = infer(server, many)
            hog.communicate("")
        expected = np.repeat(golden["logits"], 128, axis=0)
        assert np.abs(logits - expected).max() <= TOLERANCE[cuda]
        assert np.abs(infer(server, golden["images"]) - golden["logits"]).max() <= TOLERANCE[cuda]
