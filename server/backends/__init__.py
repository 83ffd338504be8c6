"""What runs a batch: one module a runtime, imported only when it is asked for."""

from typing import Protocol

from server.backends.devices import Device
from server.backends.runtimes import Runtime
from server.errors import StartupError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs


class Backend(Protocol):
    """A model on a device.

    Attributes:
        platform: The runtime's name in the Open Inference Protocol, e.g. "onnx_onnxv1".
        device: Where it really runs, as the runtime reports it: "cpu", "cuda:0".
        provider: What executes it, as the runtime reports it, e.g. "CUDAExecutionProvider".
        fixed_shapes: Whether the device prepares itself for each batch size it has not met, so that
            batches are better padded to one it has.
        inputs: The tensors that the graph itself declares; empty where the format declares none.
        outputs: The same.
    """

    platform: str
    device: str
    provider: str
    fixed_shapes: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`; safe to call from several threads at once.

        Raises:
            DeviceMemoryError: The device has no memory for a batch of this size.
        """


def load_backend(
    runtime: Runtime,
    file: VerifiedFile,
    device: Device,
    threads: int,
    cuda_graphs: bool = False,
    *,
    instances: int = 1,
) -> Backend:
    """Loads an artefact.

    Args:
        runtime: Which runtime to use.
        file: The artefact, in the runtime's format.
        device: Where to run; a device that is not usable is an error, never a silent fall-back.
        threads: CPU threads for one batch.
        cuda_graphs: Whether ONNX Runtime captures and replays a CUDA graph for each batch size.
        instances: Batches that are to run side by side.

    Raises:
        DeviceError: The device cannot be used.
        RepositoryError: The runtime cannot read the file.
        StartupError: The runtime is not installed.
    """
    try:
        match runtime:
            case Runtime.ONNX_RUNTIME:
                from server.backends.onnx import OnnxBackend

                return OnnxBackend(file, device, threads, cuda_graphs)
            case Runtime.OPENVINO:
                from server.backends.openvino import OpenVinoBackend

                return OpenVinoBackend(file, device, threads, instances)
            case Runtime.TORCHSCRIPT:
                from server.backends.torchscript import TorchScriptBackend

                return TorchScriptBackend(file, device, threads)
            case Runtime.EXPORTED_PROGRAM:
                from server.backends.exported_program import ExportedProgramBackend

                return ExportedProgramBackend(file, device, threads)
            case Runtime.AOT_INDUCTOR:
                from server.backends.aot_inductor import AotInductorBackend

                return AotInductorBackend(file, device, threads)
    except ImportError as error:
        raise StartupError(
            f"--backend {runtime.value}: expected the extra {runtime.extra} installed"
        ) from error
