"""PyTorch's three formats: TorchScript, exported programs and AOTInductor packages."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.export.passes import move_to_device_pass

from convoy.server.backends.base import is_out_of_memory
from convoy.server.backends.device import CudaOptions, Device
from convoy.server.errors import DeviceError, DeviceMemoryError, RepositoryError
from convoy.server.models.manifest import TensorSpec
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Images, Outputs

Module = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_CPU_CAPABILITY = "cpu_capability"


class ModuleRunner:
    """Runs batches through a module, from several threads at once.

    On CUDA each running batch has a stream of its own, so that the copies of one overlap the work
    of another; on the default stream one would wait for the other. The next batch reuses an idle
    stream, and with it the memory that torch keeps for it.

    Args:
        module: Maps images to the tuple (logits, probabilities).
        device: The module's device.
    """

    def __init__(self, module: Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._idle_streams: list[torch.cuda.Stream] = []

    def run(self, images: Images) -> Outputs:
        """Run a batch `[N, H, W, 3]`; when it returns, nothing reads the images any more.

        Raises:
            DeviceMemoryError: The device has no memory for it.
        """
        try:
            with torch.inference_mode(), self._stream():
                # From page-locked memory the device copies by itself.
                pixels = torch.from_numpy(images).to(self._device, non_blocking=True)
                logits, probabilities = self._module(pixels)
                # Waits for everything on the stream, the copy of the images included.
                return Outputs(logits.cpu().numpy(), probabilities.cpu().numpy())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"no memory for {len(images)} images") from error
            raise

    def close(self) -> None:
        """Free the weights at once: a module that refers to itself would keep them."""
        if isinstance(self._module, torch.nn.Module):
            for tensor in (*self._module.parameters(), *self._module.buffers()):
                tensor.data = tensor.new_empty(0)
        del self._module
        self._idle_streams.clear()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        try:
            stream = self._idle_streams.pop()
        except IndexError:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # The weights were copied on the default stream.
            stream.wait_stream(torch.cuda.default_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._idle_streams.append(stream)


class _ModuleBackend:
    """A module that was loaded from a file; the formats name no tensors, so it declares none."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, module: Module, device: Device, provider: str) -> None:
        self._runner = ModuleRunner(module, torch.device(str(device)))
        self.device = str(device)
        self.provider = provider
        self.fixed_shapes = device.kind == "cuda"

    def run(self, images: Images) -> Outputs:
        """Run a batch `[N, H, W, 3]`."""
        return self._runner.run(images)

    def release_unused(self, image: Images) -> None:
        """Give the memory that torch keeps back to the device, that of other models included."""
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release the module."""
        self._runner.close()


class TorchScriptBackend(_ModuleBackend):
    """A frozen TorchScript module that maps images to the tuple (logits, probabilities)."""

    platform = "pytorch_torchscript"

    def __init__(
        self, file: VerifiedFile, device: Device, threads: int, cuda: CudaOptions | None = None
    ) -> None:
        _prepare(device, threads, cuda)
        _interpret_as_saved()
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated; the server still offers the format.
                warnings.filterwarnings("ignore", message=r"`torch\.jit")
                module = torch.jit.load(io.BytesIO(file.content), map_location=str(device))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RepositoryError(f"{file.name}: torch cannot load it") from error
        super().__init__(module.eval(), device, f"torch-{device.kind}")


class ExportedProgramBackend(_ModuleBackend):
    """An ExportedProgram (.pt2) that maps images to the tuple (logits, probabilities)."""

    platform = "pytorch_exported_program"

    def __init__(
        self, file: VerifiedFile, device: Device, threads: int, cuda: CudaOptions | None = None
    ) -> None:
        _prepare(device, threads, cuda)
        try:
            with warnings.catch_warnings():
                # torch 2.11 warns about how it reads its own file.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                program = torch.export.load(io.BytesIO(file.content))
        # The exception type depends on how an archive is broken.
        except Exception as error:
            raise RepositoryError(f"{file.name}: torch cannot load it") from error
        # The graph names the device that it was exported on.
        module = move_to_device_pass(program, torch.device(str(device))).module()
        super().__init__(module, device, f"torch-{device.kind}")


class AotInductorBackend(_ModuleBackend):
    """An AOTInductor package of native code, on the CPU that it was compiled for.

    Loading a package runs code in it: only the SHA-256 in a manifest of trusted origin vouches
    for it.
    """

    platform = "pytorch_aot_inductor"

    def __init__(self, file: VerifiedFile, device: Device, threads: int) -> None:
        if device.kind != "cpu":
            raise DeviceError(f"device {device}: AOTInductor packages are compiled for the CPU")
        _prepare(device, threads)
        # torch loads a package by its path only: a folder that only this user may write to.
        with tempfile.TemporaryDirectory(prefix="convoy-") as folder:
            path = Path(folder) / file.name
            path.write_bytes(file.content)
            _check_processor(path)
            try:
                module = torch._inductor.aoti_load_package(str(path))
            except RuntimeError as error:
                raise RepositoryError(f"{file.name}: torch cannot load it") from error
        super().__init__(module, device, "aot-inductor-cpu")


def why_unusable(device: Device) -> str:
    """Return why torch cannot use a CUDA device at all; empty where it can."""
    try:
        torch.empty(1, device=str(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        return " ".join(str(error).split())
    return ""


def _prepare(device: Device, threads: int, cuda: CudaOptions | None = None) -> None:
    if device.kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device}: torch cannot use CUDA here")
    _allow_tf32(cuda is not None and cuda.tf32)
    torch.set_num_threads(threads)


def _allow_tf32(allowed: bool) -> None:
    """Say whether float32 products on CUDA may use TF32, as cuDNN's convolutions do by default."""
    # Not by `fp32_precision`: after it torch's own reads of `allow_tf32`, as in torch.export, fail.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _interpret_as_saved() -> None:
    """Keep TorchScript from compiling: each process, device and batch size would wait for it.

    The profiling executor compiles again for each new batch size; its fuser and the older one
    compile kernels by NVRTC in the first runs.
    """
    torch._C._jit_set_profiling_executor(False)
    torch._C._jit_set_texpr_fuser_enabled(False)
    torch._C._jit_override_can_fuse_on_gpu(False)
    torch._C._jit_override_can_fuse_on_cpu(False)


def _check_processor(path: Path) -> None:
    """Reject code for another processor before any of it runs: it could end the process."""
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
