"""torch.export's archives (.pt2), TorchScript's successor, on CPU or CUDA."""

import io
import warnings

import torch
from torch.export.passes import move_to_device_pass

from server.backends.devices import Device
from server.backends.torch_run import ModuleRunner
from server.errors import DeviceError, RepositoryError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs


class ExportedProgramBackend:
    """An ExportedProgram that maps images to the tuple (logits, probabilities)."""

    platform = "pytorch_exported_program"
    # Its tensors have no names that would tell anything.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, file: VerifiedFile, device: Device, threads: int) -> None:
        if device.kind == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device {device}: torch cannot use CUDA here")
        torch.set_num_threads(threads)
        self._device = torch.device(str(device))
        try:
            with warnings.catch_warnings():
                # torch 2.11 warns about how it reads its own file.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                program = torch.export.load(io.BytesIO(file.content))
        # What is thrown at a broken archive depends on how it is broken.
        except Exception as error:
            raise RepositoryError(f"{file.name}: torch cannot load it") from error
        # The graph names the device that it was exported on.
        module = move_to_device_pass(program, self._device).module()
        self._runner = ModuleRunner(module, self._device)
        self.device = str(device)
        self.fixed_shapes = device.kind == "cuda"
        self.provider = f"torch-{self._device.type}"

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`."""
        return self._runner.run(images)
