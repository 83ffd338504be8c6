"""The metrics of several processes as one."""

from collections.abc import Collection, Iterable, Iterator
from copy import copy

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar, Sample

from convoy.server.frontends.ipc import SampleKey, Samples

# Creation times of metrics and processes, which cannot be added up.
_TIMES = ("_created", "process_start_time_seconds")


def samples_of(registry: CollectorRegistry) -> Samples:
    """Return all values of a registry that can be added to those of other processes."""
    samples = Samples({}, {}, {})
    for family in registry.collect():
        values = samples.gauges if family.type == "gauge" else samples.counts
        for sample in family.samples:
            if not sample.name.endswith(_TIMES):
                values[_key(sample)] = sample.value
                if sample.exemplar:
                    samples.exemplars[_key(sample)] = sample.exemplar
    return samples


class MergedRegistry(CollectorRegistry):
    """A registry's metrics plus other processes' counts of the same metrics.

    The data that `collect` reads is replaced, never changed, because it runs on its own thread.

    Args:
        own: This process's.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        super().__init__()
        self._own = own
        self._others: dict[int, Samples] = {}
        # Of ended processes: a counter must not fall.
        self._past: dict[SampleKey, float] = {}

    def update(self, process: int, samples: Samples) -> None:
        """Store all values of another process."""
        self._others = self._others | {process: samples}

    def ended(self, process: int) -> None:
        """Keep the counts of a process that ended, and drop its gauges."""
        others = self._others.copy()
        if last := others.pop(process, None):
            self._past = _sums([self._past, last.counts])
        self._others = others

    def forget(self, model: str, version: int) -> None:
        """Remove the counts of ended processes for an unloaded version."""
        labels = {("model", model), ("version", str(version))}
        self._past = {key: value for key, value in self._past.items() if not labels <= set(key[1])}

    def collect(self) -> Iterator[Metric]:
        """Yield this process's metrics, with the others' values added."""
        present = [each for s in self._others.values() for each in (s.counts, s.gauges)]
        exemplars = {key: each for s in self._others.values() for key, each in s.exemplars.items()}
        return self._merged(_sums([self._past, *present]), exemplars)

    def restricted_registry(self, names: Iterable[str]) -> "_Restricted":  # type: ignore[override]
        """Return a registry with some of the samples."""
        return _Restricted(self, frozenset(names))

    def _merged(
        self, added: dict[SampleKey, float], exemplars: dict[SampleKey, Exemplar]
    ) -> Iterator[Metric]:
        for family in self._own.collect():
            merged = copy(family)
            merged.samples = [
                sample._replace(
                    value=sample.value + added.pop(key, 0.0),
                    exemplar=exemplars.get(key, sample.exemplar),
                )
                for sample in family.samples
                for key in [_key(sample)]
            ]
            names = {family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")}
            for key in [key for key in added if key[0] in names]:
                sample = Sample(key[0], dict(key[1]), added.pop(key))
                merged.samples.append(sample._replace(exemplar=exemplars.get(key)))
            yield merged


class _Restricted(CollectorRegistry):
    """Some of another registry's samples."""

    def __init__(self, registry: CollectorRegistry, names: Collection[str]) -> None:
        super().__init__()
        self._registry = registry
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have such samples, with these alone."""
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
