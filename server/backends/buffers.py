"""Memory that batches are gathered into: page-locked where a GPU reads it.

From page-locked memory a GPU copies by itself, beside whatever else it does. Ordinary memory the
driver first copies to page-locked memory of its own, and the caller waits for it.
"""

import ctypes
import weakref
from typing import Any

import numpy as np
import structlog

from server.backends.devices import Device
from server.errors import DeviceError
from server.requests import Images

logger = structlog.get_logger()

# CU_MEMHOSTALLOC_PORTABLE: page-locked for every device of the process, not for one alone.
_PORTABLE = 1


def batch_buffer(device: Device, shape: tuple[int, ...]) -> Images:
    """Returns memory for batches that a device is to run.

    Without page-locked memory everything works, at the pace of ordinary memory; one log line tells.
    """
    if device.kind == "cuda":
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            block = PageLockedBlock(driver, device.index, int(np.prod(shape)))
            return np.asarray(block).reshape(shape)
        except (OSError, DeviceError) as error:
            logger.warning("no page-locked memory", device=str(device), reason=str(error))
    return np.empty(shape, np.uint8)


class PageLockedBlock:
    """Bytes of page-locked memory, as NumPy takes an array from; freed with the last such array.

    Args:
        driver: CUDA's, which every runtime on it shares; the runtimes' own functions need torch or
            come with a version that must be guessed.
        device: The number of the device whose context allocates it.
        size_bytes: How much.

    Raises:
        DeviceError: The driver gives none.
    """

    def __init__(self, driver: Any, device: int, size_bytes: int) -> None:
        handle, address = ctypes.c_int(), ctypes.c_void_p()
        _check("cuInit", driver.cuInit(0))
        _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(handle), device))
        with _Context(driver, handle) as context:
            flags = ctypes.c_uint(_PORTABLE)
            size = ctypes.c_size_t(size_bytes)
            _check("cuMemHostAlloc", driver.cuMemHostAlloc(ctypes.byref(address), size, flags))
            # Until it is freed the context must live, whoever else lets go of it.
            context.stays = True
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size_bytes,),
            "data": (address.value, False),
        }
        # At exit the driver may be gone before.
        weakref.finalize(self, _free, driver, handle, address).atexit = False


class _Context:
    """The context that all of the process share on a device, current on this thread for a while."""

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
    # What the block held since it was allocated.
    driver.cuDevicePrimaryCtxRelease_v2(device)


def _check(function: str, code: int) -> None:
    if code != 0:
        raise DeviceError(f"{function}: the CUDA driver answers {code}")
