"""The process, its build and its GPUs.

NVIDIA's management library reports memory and utilization of the GPUs. Without a driver, or without
the library's Python package, these metrics are absent.
"""

import contextlib
import platform
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from convoy.server import __version__
from convoy.server.backends.device import cuda_uuids


class DeviceCollector(Collector):
    """Reads at every scrape the devices that CUDA offers to this process, under CUDA's numbers.

    Raises:
        ImportError: The package nvidia-ml-py is not installed.
        pynvml.NVMLError: There is no driver.
    """

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handles = {}
        for index, uuid in enumerate(cuda_uuids()):
            with contextlib.suppress(pynvml.NVMLError):
                self._handles[f"cuda:{index}"] = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics of each device."""
        memory = GaugeMetricFamily(
            "convoy_device_memory_bytes",
            "Device memory in use, by all processes.",
            labels=["device"],
        )
        utilization = GaugeMetricFamily(
            "convoy_device_utilization_ratio",
            "Share of the last sample period in which a kernel ran.",
            labels=["device"],
        )
        for name, handle in self._handles.items():
            # One by one: a slice of a device (MIG) reports its memory but not its utilization.
            with contextlib.suppress(self._nvml.NVMLError):
                memory.add_metric([name], self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            with contextlib.suppress(self._nvml.NVMLError):
                busy_percent = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                utilization.add_metric([name], busy_percent / 100)
        yield memory
        yield utilization


def watch_process(registry: CollectorRegistry, backend: str) -> None:
    """Register the metrics of this process (process_…) and of the program (convoy_build_info).

    Args:
        registry: Shows them.
        backend: The runtime that the settings select.
    """
    ProcessCollector(registry=registry)
    info = Info("convoy_build", "The server's version, Python and runtime.", registry=registry)
    info.info({"version": __version__, "python": platform.python_version(), "backend": backend})


def watch_devices(registry: CollectorRegistry) -> bool:
    """Register the metrics of the GPUs; return False without a GPU or a driver."""
    try:
        collector = DeviceCollector()
    except ImportError:
        return False
    except Exception as error:
        if type(error).__module__ != "pynvml":
            raise
        return False
    registry.register(collector)
    return True
