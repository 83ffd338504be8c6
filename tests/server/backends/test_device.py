"""Batch buffers; the CUDA driver is one of the test's own, since there may be no GPU."""

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from convoy.server.backends import device
from convoy.server.backends.base import is_out_of_memory
from convoy.server.backends.device import Device, PageLockedBlock, batch_buffer, count_cuda_devices
from convoy.server.errors import DeviceError


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


def test_a_block_lives_as_long_as_a_view_of_it():
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
    with pytest.raises(DeviceError, match="cuMemHostAlloc: the CUDA driver returned 2"):
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


@pytest.mark.parametrize(
    ("code", "fault"),
    [(0, ""), (100, ""), (803, "cuInit returned 803"), (999, "cuInit returned 999")],
)
def test_a_driver_without_a_gpu_is_no_fault(monkeypatch, code, fault):
    driver = SimpleNamespace(cuInit=lambda flags: code)
    monkeypatch.setattr(device, "_driver", lambda: driver)
    assert device.driver_fault() == fault


# As the runtimes word it, shortened.
MEMORY_ERRORS = {
    "ONNX Runtime's arena": "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code "
    "returned while running Conv node. BFCArena::AllocateRawInternal Failed to allocate memory for "
    "requested buffer of size 939524096",
    "CUDA by ONNX Runtime": "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size)",
    "cuDNN 8": "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
    "cuDNN 9": "CUDNN failure 5003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
    "cuBLAS": "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    "torch": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
    "TorchScript": "The following operation failed in the TorchScript interpreter.\nTraceback of "
    "TorchScript:\nRuntimeError: CUDA out of memory. Tried to allocate 12.00 MiB.",
    "torch on a CPU": "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't "
    "allocate memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)",
    "TensorRT": "TensorRT EP failed to create engine from network: Error Code 2: OutOfMemory "
    "(Requested size was 4294967296 bytes.)",
    "OpenVINO": "Exception from src/inference/src/cpp/infer_request.cpp: std::bad_alloc",
}
OTHER_ERRORS = {
    "a kernel": "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
    "a shape": "Got invalid dimensions for input: image for the following indices",
    "cuDNN": "CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED ; GPU=0",
}


@pytest.mark.parametrize("message", MEMORY_ERRORS.values(), ids=MEMORY_ERRORS)
def test_an_error_that_says_that_memory_ran_out(message):
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", OTHER_ERRORS.values(), ids=OTHER_ERRORS)
def test_an_error_that_says_something_else(message):
    assert not is_out_of_memory(RuntimeError(message))
