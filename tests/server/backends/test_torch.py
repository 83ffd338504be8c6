"""PyTorch's backends beside the formats themselves, which tests/e2e and tests/export cover."""

import gc
import io

import numpy as np
import pytest
import torch

from convoy.server.backends.device import CudaOptions, Device
from convoy.server.backends.torch import ModuleRunner, TorchScriptBackend, _prepare
from convoy.server.errors import DeviceMemoryError
from convoy.server.models.repository import VerifiedFile


class Cyclic(torch.nn.Module):
    """Refers to itself, as modules of exported programs do."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(3, 1000))
        self.register_buffer("offset", torch.zeros(1000))
        self.itself = [self]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = images.float().mean(dim=(1, 2)) @ self.weights + self.offset
        return logits, logits.softmax(dim=1)


def test_a_closed_module_keeps_no_weights():
    gc.disable()
    try:
        module = Cyclic()
        tensors = [module.weights, module.offset]
        runner = ModuleRunner(module, torch.device("cpu"))
        assert runner.run(np.ones((2, 4, 4, 3), np.uint8)).logits.shape == (2, 1000)
        runner.close()
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
        with pytest.raises(AttributeError):
            runner.run(np.ones((2, 4, 4, 3), np.uint8))
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_memory_that_runs_out_inside_torchscript_is_output_apart():
    class Greedy(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores = torch.empty([images.size(0) << 50])
            return scores, scores

    runner = ModuleRunner(torch.jit.script(Greedy()), torch.device("cpu"))
    with pytest.raises(DeviceMemoryError, match="no memory for 2 images"):
        runner.run(np.ones((2, 4, 4, 3), np.uint8))


def test_only_the_precision_tf32_allows_it():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    threads = torch.get_num_threads()
    try:
        for allowed in (True, False):
            _prepare(Device("cpu"), 1, CudaOptions(tf32=allowed))
            assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_compiles_nothing_in_service():
    """A fuser would compile in the first runs of each process, device and batch size."""
    before = torch._C._jit_set_profiling_executor(True)
    fusers = torch._C._jit_texpr_fuser_enabled(), torch._C._jit_can_fuse_on_gpu()
    try:
        torch._C._jit_set_texpr_fuser_enabled(True)
        torch._C._jit_override_can_fuse_on_gpu(True)
        TorchScriptBackend(VerifiedFile("model.torchscript", tiny_archive()), Device("cpu"), 1)
        assert not torch._C._jit_texpr_fuser_enabled()
        assert not torch._C._jit_can_fuse_on_gpu()
        assert not torch._C._jit_can_fuse_on_cpu()
        assert torch._C._jit_set_profiling_executor(False) is False
    finally:
        torch._C._jit_set_profiling_executor(before)
        torch._C._jit_set_texpr_fuser_enabled(fusers[0])
        torch._C._jit_override_can_fuse_on_gpu(fusers[1])


def tiny_archive() -> bytes:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = images.float().mean(dim=(1, 2))
            return logits, logits.softmax(dim=1)

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Mean()), buffer)
    return buffer.getvalue()


class LateTensor:
    """An output whose device has not yet read the images: it reads them when it is waited for."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self._pixels = pixels

    def cpu(self) -> torch.Tensor:
        return self._pixels.float().mean(dim=(1, 2))


def test_a_buffer_is_free_when_its_run_returns():
    """From page-locked memory a GPU copies by itself, some time after the call."""
    runner = ModuleRunner(
        lambda pixels: (LateTensor(pixels), LateTensor(pixels)), torch.device("cpu")
    )
    buffer = np.full((2, 4, 4, 3), 7, np.uint8)
    outputs = runner.run(buffer)
    buffer.fill(200)
    assert (outputs.logits == 7).all()
    assert (outputs.probabilities == 7).all()
