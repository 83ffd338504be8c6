"""The metrics of readiness, read at every scrape from the state that all health replies use."""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from convoy.server.models.readiness import Readiness


class _Models(Protocol):
    @property
    def readiness(self) -> Readiness: ...


class ReadinessCollector:
    """Show the readiness of the process, the server and each model in service."""

    def __init__(self, models: _Models) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        """Return the metrics without values, for the registry's check of names."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        live, ready, model_ready = _families()
        now = self._models.readiness
        live.add_metric((), now.live)
        ready.add_metric((), now.ready)
        for name, is_ready in now.models.items():
            model_ready.add_metric((name,), is_ready)
        yield from (live, ready, model_ready)


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    return (
        GaugeMetricFamily("convoy_live", "1 if the process is live; 0 if only a restart helps."),
        GaugeMetricFamily("convoy_ready", "1 while the server is ready for requests."),
        GaugeMetricFamily(
            "convoy_model_ready", "1 while a model is ready for requests.", labels=["model"]
        ),
    )
