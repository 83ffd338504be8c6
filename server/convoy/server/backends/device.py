"""Devices and runtimes by the names that the settings use, what this machine offers, batch buffers.

A GPU copies from page-locked memory by itself, while it computes. The driver copies ordinary memory
to page-locked memory of its own first, and the caller waits for that.
"""

import contextlib
import ctypes
import threading
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from convoy.server.errors import DeviceError
from convoy.server.models.manifest import ArtifactFormat
from convoy.server.requests import Images


class Runtime(Enum):
    """A library that runs artifacts; the values are those of `--backend`."""

    ONNX_RUNTIME = "onnx"
    OPENVINO = "openvino"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"

    @property
    def format(self) -> ArtifactFormat:
        """The format of the artifacts that it runs."""
        return _FORMATS[self]

    @property
    def extra(self) -> str:
        """The extra of this package that installs it."""
        return _EXTRAS[self]


logger = structlog.get_logger()

_DRIVER = "libcuda.so.1"
# CU_MEMHOSTALLOC_PORTABLE: page-locked for every device of the process, not for one alone.
_PORTABLE = 1
# CUDA_ERROR_NO_DEVICE: a driver on a machine without a GPU is no fault.
_NO_DEVICE = 100
_FORMATS = {
    Runtime.ONNX_RUNTIME: ArtifactFormat.ONNX,
    Runtime.OPENVINO: ArtifactFormat.ONNX,
    Runtime.TORCHSCRIPT: ArtifactFormat.TORCHSCRIPT,
    Runtime.EXPORTED_PROGRAM: ArtifactFormat.EXPORTED_PROGRAM,
    Runtime.AOT_INDUCTOR: ArtifactFormat.AOT_INDUCTOR,
}
_EXTRAS = {
    Runtime.ONNX_RUNTIME: "server or cpu",
    Runtime.OPENVINO: "openvino",
    Runtime.TORCHSCRIPT: "torch",
    Runtime.EXPORTED_PROGRAM: "torch",
    Runtime.AOT_INDUCTOR: "torch",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A device to run a model on.

    Attributes:
        kind: "cpu" or "cuda".
        index: The CUDA device's number; 0 for the CPU.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind == "cuda" else "cpu"


class CaptureLock:
    """Lets a CUDA graph be captured while no other graph of the process is captured or replayed.

    ONNX Runtime captures in CUDA's global mode: until the capture ends, an allocation or a copy of
    any other thread fails, and the capture with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._replays = 0
        self._capturing = False

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Wait until nothing is captured or replayed, and keep it so."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._capturing = True
            self._changed.wait_for(lambda: not self._replays)
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Wait until nothing is captured; replays run beside one another."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._replays += 1
        try:
            yield
        finally:
            with self._changed:
                self._replays -= 1
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class TensorRt:
    """What TensorRT needs to know to build and keep the engine of a model.

    Attributes:
        engines: The folder of its engines and timings, for this artifact alone; None keeps none.
        input_name: The graph's input.
        sample_shape: `(H, W, 3)`.
        best_batch_size: The size to choose kernels for.
        max_batch_size: The largest size.
        precision: Of the artifact: "fp32", "tf32", "fp16" or "int8".
    """

    engines: Path | None
    input_name: str
    sample_shape: tuple[int, int, int]
    best_batch_size: int
    max_batch_size: int
    precision: str


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a model runs on CUDA; on a CPU nothing of it matters.

    Attributes:
        tf32: Whether products of float32 may round their factors to TF32.
        graphs: Whether ONNX Runtime captures and replays a CUDA graph for each batch size.
        captures: The process's lock for that.
        tensorrt: Run ONNX by TensorRT instead of ONNX Runtime's own kernels.
    """

    tf32: bool = False
    graphs: bool = False
    captures: CaptureLock = field(default_factory=CaptureLock)
    tensorrt: TensorRt | None = None


def choose_device(wanted: str) -> Device:
    """Turn a setting (auto, cpu, cuda, cuda:1) into a device of this machine.

    Raises:
        DeviceError: The driver does not offer the CUDA device.
    """
    if wanted == "cpu":
        return Device("cpu")
    available = count_cuda_devices()
    if wanted == "auto":
        return Device("cuda") if available else Device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= available:
        fault = driver_fault()
        why = f" ({fault})" if fault else ""
        raise DeviceError(f"device {wanted!r}: the driver offers {available} CUDA devices{why}")
    return Device("cuda", index)


def choose_devices(wanted: str) -> tuple[Device, ...]:
    """Turn a setting (as for `choose_device`, cuda:all, or a comma-separated list) into devices.

    A device that is named twice is used twice.

    Raises:
        DeviceError: The driver does not offer a CUDA device that is named.
    """
    if wanted == "cuda:all":
        count = max(1, count_cuda_devices())
        return tuple(choose_device(f"cuda:{index}") for index in range(count))
    return tuple(map(choose_device, wanted.split(",")))


def count_cuda_devices() -> int:
    """Ask the CUDA driver, without any runtime, how many devices it offers; 0 without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0:
        return 0
    return count.value if driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def driver_fault() -> str:
    """Return why a CUDA driver that is installed does not work; empty where there is no fault."""
    driver = _driver()
    code = driver.cuInit(0) if driver else 0
    return "" if code in {0, _NO_DEVICE} else f"cuInit returned {code}"


def driver_version() -> str:
    """Return the CUDA version that the driver supports, such as "13.0"; "none" without a driver."""
    driver = _driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "none"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> Any:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        return None


def cuda_uuids() -> list[str]:
    """Return the UUIDs of the CUDA devices, such as GPU-8d3f…, in CUDA's order.

    CUDA numbers the devices that CUDA_VISIBLE_DEVICES leaves, mostly the fastest first; the
    management library numbers all devices by their place on the bus. The UUID is the same in both.
    """
    uuids = []
    for index in range(count_cuda_devices()):
        driver = _driver()
        handle, content = ctypes.c_int(), ctypes.create_string_buffer(16)
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetUuid(content, handle)
        uuids.append(f"GPU-{uuid.UUID(bytes=content.raw)}")
    return uuids


def batch_buffer(device: Device, shape: tuple[int, ...]) -> Images:
    """Allocate a buffer for the batches of a device.

    Where the driver gives no page-locked memory, ordinary memory takes its place, which is slower;
    a log line says so.

    Returns:
        An uninitialized array of this shape, uint8.
    """
    if device.kind == "cuda":
        try:
            driver = ctypes.CDLL(_DRIVER)
            block = PageLockedBlock(driver, device.index, int(np.prod(shape)))
            return np.asarray(block).reshape(shape)
        except (OSError, DeviceError) as error:
            logger.warning("no page-locked memory", device=str(device), reason=str(error))
    return np.empty(shape, np.uint8)


class PageLockedBlock:
    """Page-locked memory with NumPy's array interface; freed with the last array on it.

    Args:
        driver: The CUDA driver, which all runtimes share; the runtimes' own functions need torch or
            a library whose version must be guessed.
        device: The number of the device whose context allocates the memory.
        size_bytes: The size of the memory.

    Raises:
        DeviceError: The driver allocates none.
    """

    def __init__(self, driver: Any, device: int, size_bytes: int) -> None:
        handle, address = ctypes.c_int(), ctypes.c_void_p()
        _check("cuInit", driver.cuInit(0))
        _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(handle), device))
        with _Context(driver, handle) as context:
            flags = ctypes.c_uint(_PORTABLE)
            size = ctypes.c_size_t(size_bytes)
            _check("cuMemHostAlloc", driver.cuMemHostAlloc(ctypes.byref(address), size, flags))
            # The context must live until the memory is freed, whoever else releases it.
            context.stays = True
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size_bytes,),
            "data": (address.value, False),
        }
        # At exit the driver may be unloaded first.
        weakref.finalize(self, _free, driver, handle, address).atexit = False


class _Context:
    """The primary context of a device, current on this thread inside the block."""

    def __init__(self, driver: Any, device: ctypes.c_int) -> None:
        self.stays = False
        self._driver = driver
        self._device = device

    def __enter__(self) -> "_Context":
        driver, context = self._driver, ctypes.c_void_p()
        retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
        _check("cuDevicePrimaryCtxRetain", retained)
        _check("cuCtxPushCurrent", driver.cuCtxPushCurrent_v2(context))
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        if not self.stays:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)


def _free(driver: Any, device: ctypes.c_int, address: ctypes.c_void_p) -> None:
    with _Context(driver, device):
        driver.cuMemFreeHost(address)
    # The reference that the block held since its allocation.
    driver.cuDevicePrimaryCtxRelease_v2(device)


def _check(function: str, code: int) -> None:
    if code != 0:
        raise DeviceError(f"{function}: the CUDA driver returned {code}")
