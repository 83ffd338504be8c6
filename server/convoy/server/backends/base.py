"""The interface of a loaded model, and the function that loads one."""

import contextlib
import importlib
import re
from collections.abc import Iterator
from typing import Protocol

import structlog

from convoy.server.backends.device import (
    CudaOptions,
    Device,
    Runtime,
    choose_devices,
    driver_fault,
    driver_version,
)
from convoy.server.errors import DeviceError, StartupError
from convoy.server.models.manifest import TensorSpec
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Images, Outputs

logger = structlog.get_logger()

_MODULES = {
    Runtime.ONNX_RUNTIME: "onnx",
    Runtime.OPENVINO: "openvino",
    Runtime.TORCHSCRIPT: "torch",
    Runtime.EXPORTED_PROGRAM: "torch",
    Runtime.AOT_INDUCTOR: "torch",
}

# Messages of CUDA, cuBLAS, cuDNN 8 and 9, ONNX Runtime's arena, TensorRT, OpenVINO and torch: most
# raise the exception type that they raise for everything else, and TorchScript wraps torch's.
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|(failed to|cannot|can't) allocate|bad_alloc|ALLOC(ATION)?_FAILED",
    re.IGNORECASE,
)


class Backend(Protocol):
    """A model on a device.

    Attributes:
        platform: The runtime's name in the Open Inference Protocol, e.g. "onnx_onnxv1".
        device: The device in use, as the runtime reports it: "cpu", "cuda:0".
        provider: The runtime's executor, as the runtime reports it: "CUDAExecutionProvider".
        fixed_shapes: Whether the device prepares itself for each new batch size, so that padding a
            batch to a known size is faster.
        inputs: The tensors that the graph declares; empty where the format declares none.
        outputs: The tensors that it returns; empty where the format declares none.
    """

    platform: str
    device: str
    provider: str
    fixed_shapes: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, images: Images) -> Outputs:
        """Run a batch; several threads may call it at once.

        Args:
            images: `[N, H, W, 3]` uint8.

        Raises:
            DeviceMemoryError: The device has no memory for a batch of this size.
        """

    def release_unused(self, image: Images) -> None:
        """Give back the memory that no run uses at the moment; no other may be in progress.

        Args:
            image: `[1, H, W, 3]` uint8, for a run that gives it back.
        """

    def close(self) -> None:
        """Release the model and its memory; no run may be in progress, and none may follow."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a runtime's error says that the device, or the host, had no memory left."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def import_runtime(runtime: Runtime) -> None:
    """Import a runtime, which `load_backend` would do for the first model.

    Raises:
        StartupError: The runtime is not installed.
    """
    with _missing_extra(runtime):
        importlib.import_module(f"convoy.server.backends.{_MODULES[runtime]}")


def why_unusable(runtime: Runtime, device: Device) -> str:
    """Return why a runtime cannot use a device at all, in one line; empty where it can.

    A driver may offer devices and be too old for the CUDA version that the runtime was built for.

    Raises:
        StartupError: The runtime is not installed.
    """
    if device.kind == "cpu":
        return ""
    with _missing_extra(runtime):
        match runtime:
            case Runtime.ONNX_RUNTIME:
                from convoy.server.backends import onnx

                return onnx.why_unusable(device)
            case Runtime.TORCHSCRIPT | Runtime.EXPORTED_PROGRAM:
                from convoy.server.backends import torch

                return torch.why_unusable(device)
    return f"{runtime.value} runs on the CPU only"


def find_devices(wanted: str, runtime: Runtime) -> tuple[Device, ...]:
    """Turn the setting `--device` into devices that a runtime can use.

    Raises:
        DeviceError: The driver does not offer a device that is named, or the runtime cannot use it.
        StartupError: The runtime is not installed.
    """
    devices = choose_devices(wanted)
    if wanted == "auto" and devices[0].kind == "cpu" and (fault := driver_fault()):
        logger.warning("running on the CPU: the CUDA driver does not work", reason=fault)
    for device in dict.fromkeys(devices):
        reason = why_unusable(runtime, device)
        if not reason:
            continue
        supports = driver_version()
        if wanted != "auto":
            raise DeviceError(
                f"--device {wanted}: {runtime.value} cannot use {device}, whose driver supports "
                f"CUDA {supports}: {reason}"
            )
        logger.warning(
            "running on the CPU: the runtime cannot use the CUDA device",
            device=str(device),
            backend=runtime.value,
            driver_supports=f"CUDA {supports}",
            reason=reason,
        )
        return (Device("cpu"),)
    return devices


def load_backend(
    runtime: Runtime,
    file: VerifiedFile,
    device: Device,
    threads: int,
    cuda: CudaOptions | None = None,
    *,
    instances: int = 1,
) -> Backend:
    """Load an artifact.

    Args:
        runtime: The runtime to load it with.
        file: The artifact, in the runtime's format.
        device: The device to run on; there is no fallback to another one.
        threads: CPU threads for one batch.
        cuda: How it runs on CUDA.
        instances: Batches that run at the same time.

    Raises:
        DeviceError: The device cannot be used.
        RepositoryError: The runtime cannot read the file.
        StartupError: The runtime is not installed.
    """
    with _missing_extra(runtime):
        match runtime:
            case Runtime.ONNX_RUNTIME:
                from convoy.server.backends.onnx import OnnxBackend

                return OnnxBackend(file, device, threads, cuda)
            case Runtime.OPENVINO:
                from convoy.server.backends.openvino import OpenVinoBackend

                return OpenVinoBackend(file, device, threads, instances)
            case Runtime.TORCHSCRIPT:
                from convoy.server.backends.torch import TorchScriptBackend

                return TorchScriptBackend(file, device, threads, cuda)
            case Runtime.EXPORTED_PROGRAM:
                from convoy.server.backends.torch import ExportedProgramBackend

                return ExportedProgramBackend(file, device, threads, cuda)
            case Runtime.AOT_INDUCTOR:
                from convoy.server.backends.torch import AotInductorBackend

                return AotInductorBackend(file, device, threads)


@contextlib.contextmanager
def _missing_extra(runtime: Runtime) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise StartupError(
            f"--backend {runtime.value}: expected the extra {runtime.extra} installed"
        ) from error
