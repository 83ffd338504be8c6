"""TorchScript on CPU or CUDA."""

import io
import warnings

import torch

from server.backends.devices import Device
from server.backends.torch_run import ModuleRunner
from server.errors import DeviceError, RepositoryError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs


class TorchScriptBackend:
    """A frozen TorchScript module that maps images to the tuple (logits, probabilities)."""

    platform = "pytorch_torchscript"
    # The format names and types no tensors.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, file: VerifiedFile, device: Device, threads: int) -> None:
        if device.kind == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device {device}: torch cannot use CUDA here")
        torch.set_num_threads(threads)
        # The profiling executor would compile anew for each batch size it meets.
        torch._C._jit_set_profiling_executor(False)
        self._device = torch.device(str(device))
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated but stays a format that is served.
                warnings.filterwarnings("ignore", message=r"`torch\.jit")
                module = torch.jit.load(io.BytesIO(file.content), map_location=self._device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RepositoryError(f"{file.name}: torch cannot load it") from error
        self._runner = ModuleRunner(module.eval(), self._device)
        self.device = str(device)
        self.fixed_shapes = device.kind == "cuda"
        self.provider = f"torch-{self._device.type}"

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`."""
        return self._runner.run(images)
