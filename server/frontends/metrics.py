"""The numbers of several processes as one."""

from collections.abc import Collection, Iterable, Iterator
from copy import copy

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from server.frontends.messages import SampleKey

# When a child was made, which cannot be added up.
_CREATED = "_created"


def samples_of(registry: CollectorRegistry) -> dict[SampleKey, float]:
    """Returns all values of a registry whose metrics are counters and histograms."""
    return {
        _key(sample): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(_CREATED)
    }


class MergedRegistry(CollectorRegistry):
    """Shows a registry with what other processes counted for the same metrics.

    What `collect` reads is replaced, never changed, since it runs on a thread of its own.

    Args:
        own: This process's.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        super().__init__()
        self._own = own
        self._others: dict[int, dict[SampleKey, float]] = {}
        # Of processes that are gone: a counter must not fall.
        self._past: dict[SampleKey, float] = {}

    def update(self, process: int, values: dict[SampleKey, float]) -> None:
        """Another process tells all that it counted so far."""
        self._others = self._others | {process: values}

    def ended(self, process: int) -> None:
        """A process is gone; what it counted stays."""
        others = self._others.copy()
        self._past = _sums([self._past, others.pop(process, {})])
        self._others = others

    def forget(self, model: str, version: int) -> None:
        """Takes out what ended processes counted for a version that is gone; others tell anew."""
        labels = {("model", model), ("version", str(version))}
        self._past = {key: value for key, value in self._past.items() if not labels <= set(key[1])}

    def collect(self) -> Iterator[Metric]:
        """Yields this process's metrics, with the others' values added."""
        return self._merged(_sums([self._past, *self._others.values()]))

    def restricted_registry(self, names: Iterable[str]) -> "_Restricted":  # type: ignore[override]
        """Returns a registry with some of the samples."""
        return _Restricted(self, frozenset(names))

    def _merged(self, added: dict[SampleKey, float]) -> Iterator[Metric]:
        for family in self._own.collect():
            merged = copy(family)
            merged.samples = [
                sample._replace(value=sample.value + added.pop(_key(sample), 0.0))
                for sample in family.samples
            ]
            names = {family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")}
            for key in [key for key in added if key[0] in names]:
                merged.samples.append(Sample(key[0], dict(key[1]), added.pop(key)))
            yield merged


class _Restricted(CollectorRegistry):
    """Some of another registry's samples."""

    def __init__(self, registry: CollectorRegistry, names: Collection[str]) -> None:
        super().__init__()
        self._registry = registry
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Yields the families that have such samples, with these alone."""
        for family in self._registry.collect():
            restricted = copy(family)
            restricted.samples = [each for each in family.samples if each.name in self._names]
            if restricted.samples:
                yield restricted


def _key(sample: Sample) -> SampleKey:
    return sample.name, tuple(sorted(sample.labels.items()))


def _sums(many: Iterable[dict[SampleKey, float]]) -> dict[SampleKey, float]:
    sums: dict[SampleKey, float] = {}
    for values in many:
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums
