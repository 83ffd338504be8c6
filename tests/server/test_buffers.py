"""Batch buffers; the CUDA driver is one of the test's own, since there may be no GPU."""

import ctypes
import gc

import numpy as np
import pytest
import structlog

from server.backends.buffers import PageLockedBlock, batch_buffer
from server.backends.devices import Device, count_cuda_devices
from server.errors import DeviceError


class Driver:
    """Gives ordinary memory and keeps count, as strict as CUDA's about the current context."""

    def __init__(self, memory_bytes: int = 1 << 20) -> None:
        self.memory_bytes = memory_bytes
        self.blocks: dict[int, ctypes.Array] = {}
        self.retained = 0
        self.current: list[int] = []
        self.device = -1

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, handle, number):
        handle._obj.value = 100 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.device = device.value
        self.retained += 1
        context._obj.value = 7
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        assert device.value == self.device
        self.retained -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.current.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.current.pop()
        return 0

    def cuMemHostAlloc(self, address, size, flags):
        if not self.current:
            return 201
        if size.value > self.memory_bytes:
            return 2
        assert flags.value == 1
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        return 0

    def cuMemFreeHost(self, address):
        assert self.current
        del self.blocks[address.value]
        return 0


def test_a_block_lives_as_long_as_an_array_that_looks_into_it():
    driver = Driver()
    array = np.asarray(PageLockedBlock(driver, 3, 24)).reshape(2, 4, 3)
    assert (driver.device, driver.retained, driver.current) == (103, 1, [])
    array[1] = 9
    part = array[1:]
    del array
    gc.collect()
    (block,) = driver.blocks.values()
    assert block.raw == bytes(12) + bytes([9]) * 12
    assert (part == 9).all()
    del part
    gc.collect()
    assert (driver.blocks, driver.retained, driver.current) == ({}, 0, [])


def test_a_driver_without_memory_keeps_nothing():
    driver = Driver(memory_bytes=8)
    with pytest.raises(DeviceError, match="cuMemHostAlloc: the CUDA driver answers 2"):
        PageLockedBlock(driver, 0, 9)
    assert (driver.blocks, driver.retained, driver.current) == ({}, 0, [])


def test_a_cpu_reads_ordinary_memory():
    buffer = batch_buffer(Device("cpu"), (2, 4, 6, 3))
    assert (buffer.shape, buffer.dtype) == ((2, 4, 6, 3), np.uint8)
    assert buffer.flags.c_contiguous
    assert buffer.flags.writeable


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_without_page_locked_memory_batches_are_gathered_all_the_same():
    with structlog.testing.capture_logs() as logs:
        assert batch_buffer(Device("cuda"), (2, 4, 6, 3)).shape == (2, 4, 6, 3)
    assert [(entry["event"], entry["device"]) for entry in logs] == [
        ("no page-locked memory", "cuda:0")
    ]
