"""The metrics of requests and of models, over a registry that is passed in.

Durations are in seconds. Labels come from closed sets: the models in service, the RPCs, the status
codes, the outcomes; a name that a caller made up never becomes a label. What a batch tells is in
`batch_metrics`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from server.requests import Outcome

# 0.25 ms to 10 s: a small net on a warm server to a large one under overload.
DURATION_BUCKETS_S = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
# Below zero the answer came too late.
SLACK_BUCKETS_S = (
    *(-1.0, -0.1, -0.01, 0.0, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)


class VersionCollector(Protocol):
    """Metrics labelled by model and version that count in a way of their own."""

    def collect(self) -> Iterable[Metric]:
        """Returns them as they are."""

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Forgets the version that `model` and `version` name."""


class VersionFamilies:
    """Makes metrics labelled by model and version, and forgets a version in all of them.

    Without `forget` every version that was ever served would stay in each scrape.

    Example:
        families = VersionFamilies(registry)
        padded = families.counter("convoy_padded_images_total", "Images added to fill a bucket.")
        padded.labels("digits", "1").inc(3)
        families.forget("digits", 1)
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._families: list[Counter | Gauge | Histogram | VersionCollector] = []

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Makes a counter."""
        family = Counter(name, text, ["model", "version", *labels], registry=self.registry)
        self._families.append(family)
        return family

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """Makes a gauge."""
        family = Gauge(name, text, ["model", "version", *labels], registry=self.registry)
        self._families.append(family)
        return family

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        """Makes a histogram."""
        family = Histogram(
            name, text, ["model", "version", *labels], buckets=buckets, registry=self.registry
        )
        self._families.append(family)
        return family

    def adopt(self, collector: VersionCollector) -> None:
        """Shows metrics that were made elsewhere."""
        self.registry.register(collector)
        self._families.append(collector)

    def forget(self, model: str, version: int) -> None:
        """Takes a version's children out of every family."""
        for family in self._families:
            family.remove_by_labels({"model": model, "version": str(version)})


class ServerMetrics:
    """What the server tells about its requests and models.

    Attributes:
        families: Makes further metrics by model and version.
        unknown_model: Counts the requests that named no model in service.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.families = VersionFamilies(registry)
        self._request_families = _RequestFamilies(self.families)
        self.unknown_model = RequestMetrics(self._request_families, "", "")
        self.models = ModelMetrics(self.families)

    def requests_of(self, model: str, version: int) -> "RequestMetrics":
        """Returns what counts the requests of one version."""
        return RequestMetrics(self._request_families, model, str(version))

    def forget(self, model: str, version: int) -> None:
        """Takes out all that is labelled with a version."""
        self.families.forget(model, version)


class _RequestFamilies:
    def __init__(self, families: VersionFamilies) -> None:
        self.duration = families.histogram(
            "convoy_request_duration_seconds",
            "From the arrival of a request until its reply, by RPC and status code.",
            DURATION_BUCKETS_S,
            ["method", "code"],
        )
        self.outcomes = families.counter(
            "convoy_outcomes_total", "Requests for inference by how they ended.", ["reason"]
        )
        self.in_slo = families.counter(
            "convoy_in_slo_requests_total",
            "Requests answered before their deadline, or that had none: the goodput.",
        )
        self.slack = families.histogram(
            "convoy_deadline_slack_seconds",
            "What was left until the deadline when the answer was ready.",
            SLACK_BUCKETS_S,
        )


class RequestMetrics:
    """Counts the requests of one version; resolves each label set once.

    Example:
        requests = metrics.requests_of("digits", 1)
        requests.finished("ModelInfer", "OK", 0.004)
        requests.outcome(Outcome.OK, slack_s=0.021)
    """

    def __init__(self, families: _RequestFamilies, model: str, version: str) -> None:
        self._families = families
        self._labels = (model, version)
        self._durations: dict[tuple[str, str], Histogram] = {}
        self._outcomes: dict[Outcome, Counter] = {}
        self._in_slo: Counter | None = None
        self._slack: Histogram | None = None
        self._closed = False

    def close(self) -> None:
        """Makes no new label sets: a late reply must not revive a version that is forgotten."""
        self._closed = True

    def finished(self, method: str, code: str, duration_s: float) -> None:
        """An RPC ended with a status code."""
        child = self._durations.get((method, code))
        if child is None:
            if self._closed:
                return
            child = self._families.duration.labels(*self._labels, method, code)
            self._durations[method, code] = child
        child.observe(duration_s)

    def outcome(self, outcome: Outcome, slack_s: float = float("inf")) -> None:
        """A request for inference ended.

        Args:
            outcome: How.
            slack_s: What was left until its deadline; infinity where it had none.
        """
        child = self._outcomes.get(outcome)
        if child is None:
            if self._closed:
                return
            child = self._families.outcomes.labels(*self._labels, outcome.value)
            self._outcomes[outcome] = child
        child.inc()
        if outcome is Outcome.OK:
            self._answered(slack_s)

    def _answered(self, slack_s: float) -> None:
        if self._in_slo is None or self._slack is None:
            if self._closed:
                return
            self._in_slo = self._families.in_slo.labels(*self._labels)
            self._slack = self._families.slack.labels(*self._labels)
        if slack_s >= 0:
            self._in_slo.inc()
        if slack_s != float("inf"):
            self._slack.observe(slack_s)


@dataclass(frozen=True, slots=True)
class RunsOn:
    """What really runs a version: the labels of convoy_model_info.

    Attributes:
        platform: The runtime's name in the Open Inference Protocol.
        device: Where, as the runtime reports it; several by commas.
        provider: What executes it there.
        precision: Of the artefact.
    """

    platform: str
    device: str
    provider: str
    precision: str


class ModelMetrics:
    """What happens to models and their versions."""

    def __init__(self, families: VersionFamilies) -> None:
        registry = families.registry
        self._info = families.gauge(
            "convoy_model_info",
            "1 for each version in service, with what really runs it.",
            ["platform", "device", "provider", "precision"],
        )
        self._load_s = families.gauge(
            "convoy_model_load_seconds", "Time a version took from its manifest to its last check."
        )
        self._warmup_s = families.gauge(
            "convoy_model_warmup_seconds", "Time a version took to run every batch size once."
        )
        self._ready = Gauge(
            "convoy_model_ready", "1 while a model takes requests.", ["model"], registry=registry
        )
        self._swaps = Counter(
            "convoy_version_swaps_total",
            "Versions that took the place of another.",
            ["model"],
            registry=registry,
        )
        self._refusals = Counter(
            "convoy_version_refusals_total",
            "Versions that were not put into service, by reason.",
            ["model", "reason"],
            registry=registry,
        )
        self._rollbacks = Counter(
            "convoy_rollbacks_total",
            "Canaries that were taken back, by reason.",
            ["model", "reason"],
            registry=registry,
        )

    def loaded(self, model: str, version: int, load_s: float, warmup_s: float) -> None:
        """A version was loaded, warmed up and checked."""
        self._load_s.labels(model, version).set(load_s)
        self._warmup_s.labels(model, version).set(warmup_s)

    def serves(self, model: str, version: int, runs_on: RunsOn) -> None:
        """A version takes requests."""
        self._info.labels(
            model, version, runs_on.platform, runs_on.device, runs_on.provider, runs_on.precision
        ).set(1)

    def ready(self, model: str, ready: bool) -> None:
        """A model takes requests, or no longer."""
        self._ready.labels(model).set(ready)

    def swapped(self, model: str) -> None:
        """A version took the place of another."""
        self._swaps.labels(model).inc()

    def refused(self, model: str, reason: str) -> None:
        """A version was not put into service."""
        self._refusals.labels(model, reason).inc()

    def rolled_back(self, model: str, reason: str) -> None:
        """A canary was taken back."""
        self._rollbacks.labels(model, reason).inc()

    def removed(self, model: str) -> None:
        """A model is served no more."""
        self._ready.remove(model)
