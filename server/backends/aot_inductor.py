"""AOTInductor's packages of native code, on the CPU they were compiled for.

Loading one runs what it holds: only the SHA-256 in a manifest of trusted origin vouches for it.
"""

import tempfile
from pathlib import Path

import torch

from server.backends.devices import Device
from server.backends.torch_run import ModuleRunner
from server.errors import DeviceError, RepositoryError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs

_CPU_CAPABILITY = "cpu_capability"


class AotInductorBackend:
    """A compiled package that maps images to the tuple (logits, probabilities)."""

    platform = "pytorch_aot_inductor"
    fixed_shapes = False
    # The format names and types no tensors.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, file: VerifiedFile, device: Device, threads: int) -> None:
        if device.kind != "cpu":
            raise DeviceError(f"device {device}: AOTInductor packages are compiled for the CPU")
        torch.set_num_threads(threads)
        # torch takes a package by its path only: a folder that nobody else may write to.
        with tempfile.TemporaryDirectory(prefix="convoy-") as folder:
            path = Path(folder) / file.name
            path.write_bytes(file.content)
            _check_processor(path)
            try:
                module = torch._inductor.aoti_load_package(str(path))
            except RuntimeError as error:
                raise RepositoryError(f"{file.name}: torch cannot load it") from error
        self._runner = ModuleRunner(module, torch.device("cpu"))
        self.device = str(device)
        self.provider = "aot-inductor-cpu"

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`."""
        return self._runner.run(images)


def _check_processor(path: Path) -> None:
    """Refuses code for another processor before any of it is run: it could end the process."""
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader
        metadata = loader.load_metadata_from_package(str(path), "model")  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise RepositoryError(f"{path.name}: torch cannot load it") from error
    compiled_for, ours = metadata.get(_CPU_CAPABILITY), torch.backends.cpu.get_cpu_capability()
    if compiled_for != ours:
        raise RepositoryError(
            f"{path.name}: expected code for this processor ({ours}), got code for {compiled_for}"
        )
