"""Transfers on CUDA: from page-locked memory, beside the work of another batch."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import Device, Runtime, batch_buffer
from convoy.server.models.repository import ModelVersion, read_manifest

SHAPE = (256, 32, 32, 3)
GPU = Device("cuda")


def load(folder: Path, runtime: Runtime) -> Backend:
    manifest = read_manifest(folder)
    file = ModelVersion(folder, manifest).read(manifest.artifact(runtime.format, "fp32").file)
    return load_backend(runtime, file, GPU, threads=1)


def overlap(first: dict, second: dict) -> bool:
    starts_us = max(first["ts"], second["ts"])
    return starts_us < min(each["ts"] + each["dur"] for each in (first, second))


def test_batches_are_gathered_in_page_locked_memory(cuda):
    import torch

    buffer = batch_buffer(GPU, SHAPE)
    assert buffer.shape == SHAPE
    assert torch.from_numpy(buffer).is_pinned()
    assert torch.from_numpy(buffer[7:9]).is_pinned()


@pytest.mark.parametrize("runtime", [Runtime.ONNX_RUNTIME, Runtime.TORCHSCRIPT])
def test_a_transfer_overlaps_the_work_of_another_batch(models, cuda, runtime, tmp_path):
    """The profiler sees what every runtime in the process gives the device."""
    from torch.profiler import ProfilerActivity, profile

    backend = load(models / "digits" / "1", runtime)
    buffers = [batch_buffer(GPU, SHAPE) for _ in range(2)]
    for buffer in buffers:
        buffer.fill(0)
    with ThreadPoolExecutor(2) as instances:
        list(instances.map(backend.run, buffers * 4))
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            list(instances.map(backend.run, buffers * 100))
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [
        event
        for event in events
        if event.get("cat") == "gpu_memcpy"
        and "HtoD" in event["name"]
        and event["args"]["bytes"] == buffers[0].nbytes
    ]
    assert len(copies) == 200
    assert all("Pinned" in copy["name"] for copy in copies), copies[0]
    assert any(
        copy["args"]["stream"] != kernel["args"]["stream"] and overlap(copy, kernel)
        for copy, kernel in product(copies, kernels)
    )
