"""Memory and utilisation of the GPUs, as NVIDIA's management library reports them.

Without a driver, or without the library's Python package, there are no such metrics and no error.
"""

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.backends.devices import cuda_uuids


class DeviceCollector(Collector):
    """Asks the devices that CUDA offers to this process, by its numbers, on every scrape.

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
        """Reads every device; one that does not answer is left out."""
        memory = GaugeMetricFamily(
            "convoy_device_memory_bytes",
            "Device memory in use, by all processes.",
            labels=["device"],
        )
        utilisation = GaugeMetricFamily(
            "convoy_device_utilisation_ratio",
            "Share of the last sample period in which a kernel ran.",
            labels=["device"],
        )
        for name, handle in self._handles.items():
            try:
                used = self._nvml.nvmlDeviceGetMemoryInfo(handle).used
                busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except self._nvml.NVMLError:
                continue
            memory.add_metric([name], used)
            utilisation.add_metric([name], busy / 100)
        yield memory
        yield utilisation


def watch_devices(registry: CollectorRegistry) -> bool:
    """Adds the metrics of the GPUs; returns False where there is none to watch."""
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
