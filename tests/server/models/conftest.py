"""Devices that fail, or have little memory."""

import pytest

from convoy.server.backends.onnx import OnnxBackend
from convoy.server.errors import DeviceMemoryError


class Spoiled:
    """Makes the runs of the backends in a set fail, and those of more images than fit."""

    def __init__(self, monkeypatch) -> None:
        self.backends: set[OnnxBackend] = set()
        self.memory_images = 1_000_000
        run = OnnxBackend.run

        def run_or_fail(backend, images):
            if backend in self.backends:
                raise RuntimeError("the device is lost")
            if len(images) > self.memory_images:
                raise DeviceMemoryError(f"no memory for {len(images)} images")
            return run(backend, images)

        monkeypatch.setattr(OnnxBackend, "run", run_or_fail)


@pytest.fixture
def spoiled(monkeypatch) -> Spoiled:
    """To be asked for before what loads a version."""
    return Spoiled(monkeypatch)
