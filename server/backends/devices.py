"""Devices by name, and what this machine offers of them."""

import ctypes
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from server.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model shall run.

    Attributes:
        kind: "cpu" or "cuda".
        index: The CUDA device's number; 0 for the CPU.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind == "cuda" else "cpu"


def choose_device(wanted: str) -> Device:
    """Turns a setting (auto, cpu, cuda, cuda:1) into a device that this machine has.

    Raises:
        DeviceError: A CUDA device was asked for that the driver does not offer.
    """
    if wanted == "cpu":
        return Device("cpu")
    available = count_cuda_devices()
    if wanted == "auto":
        return Device("cuda") if available else Device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= available:
        raise DeviceError(f"device {wanted!r}: the driver offers {available} CUDA devices")
    return Device("cuda", index)


def choose_devices(wanted: str) -> tuple[Device, ...]:
    """Turns a setting (as for `choose_device`, cuda:all, or several by commas) into devices.

    A device that is named twice is taken twice.

    Raises:
        DeviceError: A CUDA device was asked for that the driver does not offer.
    """
    if wanted == "cuda:all":
        count = max(1, count_cuda_devices())
        return tuple(choose_device(f"cuda:{index}") for index in range(count))
    return tuple(map(choose_device, wanted.split(",")))


def count_cuda_devices() -> int:
    """Asks the CUDA driver, without any runtime, how many devices it offers; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_uuids() -> list[str]:
    """Asks the CUDA driver what its devices are called everywhere, such as GPU-8d3f…, in its order.

    CUDA numbers what CUDA_VISIBLE_DEVICES leaves of them, mostly the fastest first; the management
    library numbers all of them by their place on the bus.
    """
    uuids = []
    for index in range(count_cuda_devices()):
        driver = ctypes.CDLL("libcuda.so.1")
        handle, content = ctypes.c_int(), ctypes.create_string_buffer(16)
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetUuid(content, handle)
        uuids.append(f"GPU-{uuid.UUID(bytes=content.raw)}")
    return uuids


def usable_cpus() -> int:
    """Whole processors this process may use: its affinity, further bounded by a cgroup v2 quota.

    ONNX Runtime and torch look at neither and would start a thread per core of the host.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
