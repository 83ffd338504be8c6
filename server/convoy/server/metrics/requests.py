"""The metrics of requests and of models, on a registry that is passed in.

Durations are in seconds. Labels come from closed sets (the models in service, the RPCs, the status
codes, the outcomes): a name from a request never becomes a label. `batches` has the metrics of
batches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from convoy.server.requests import Outcome


class CallMetrics(Collector):
    """Count calls by protocol, method and status.

    A custom collector: counting a call is one addition to a dictionary.

    Args:
        registry: Shows the counts.

    Attributes:
        ended: Calls by (protocol, method, code). A method that the server does not have is counted
            as "unknown": names that callers make up never become labels.
        open: Calls in flight by protocol.

    Example:
        metrics.count("grpc", "ModelInfer", "OK")
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended: dict[tuple[str, str, str], int] = {}
        self.open: dict[str, int] = {"grpc": 0, "http": 0}
        registry.register(self)

    def count(self, protocol: str, method: str, code: str) -> None:
        """Count a call that ended."""
        key = protocol, method, code
        self.ended[key] = self.ended.get(key, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Yield the counts as they are."""
        ended = CounterMetricFamily(
            "convoy_calls",
            "Calls that ended, by method and status, including those rejected before inference.",
            labels=["protocol", "method", "code"],
        )
        for key, count in self.ended.copy().items():
            ended.add_metric(key, count)
        yield ended
        under_way = GaugeMetricFamily(
            "convoy_open_calls", "Calls in flight, streams included.", labels=["protocol"]
        )
        for protocol, count in self.open.items():
            under_way.add_metric([protocol], count)
        yield under_way


# 0.25 ms to 10 s: a small net on a warm server to a large one under overload.
DURATION_BUCKETS_S = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
# A negative value is a late answer.
SLACK_BUCKETS_S = (
    *(-1.0, -0.1, -0.01, 0.0, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)


class VersionCollector(Protocol):
    """Metrics labeled by model and version other than Counter, Gauge and Histogram."""

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all versions."""

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove the version that `model` and `version` name."""


class VersionFamilies:
    """Creates metrics labeled by model and version, and removes a version from all of them.

    Without `forget` every version that was ever served would stay in the scrapes.

    Example:
        families = VersionFamilies(registry)
        padded = families.counter("convoy_padded_images_total", "Images added to pad batches.")
        padded.labels("digits", "1").inc(3)
        families.forget("digits", 1)
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._families: list[Counter | Gauge | Histogram | VersionCollector] = []

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Create a counter."""
        family = Counter(name, text, ["model", "version", *labels], registry=self.registry)
        self._families.append(family)
        return family

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """Create a gauge."""
        family = Gauge(name, text, ["model", "version", *labels], registry=self.registry)
        self._families.append(family)
        return family

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        """Create a histogram."""
        family = Histogram(
            name, text, ["model", "version", *labels], buckets=buckets, registry=self.registry
        )
        self._families.append(family)
        return family

    def adopt(self, collector: VersionCollector) -> None:
        """Register a collector of further metrics."""
        self.registry.register(collector)
        self._families.append(collector)

    def forget(self, model: str, version: int) -> None:
        """Remove the children of a version from every family."""
        for family in self._families:
            family.remove_by_labels({"model": model, "version": str(version)})


class ServerMetrics:
    """The metrics of the server's requests and models.

    Attributes:
        families: Creates further metrics by model and version.
        calls: Counts calls, whether or not they reach a model.
        unknown_model: Counts the requests that name no model in service.
        models: Counts what happens to models.
        slow_decodes: Counts the decoding threads that were substituted.
        decode_queue: Image files in the decoder, waiting or being decoded.
        decode_queue_limit: Image files that the decoder may hold.
        rejected_tokens: Counts the requests without a valid token, by port.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.calls = CallMetrics(registry)
        self.families = VersionFamilies(registry)
        self._request_families = _RequestFamilies(self.families)
        self.unknown_model = RequestMetrics(self._request_families, "", "")
        self.models = ModelMetrics(self.families)
        self.slow_decodes = Counter(
            "convoy_slow_decodes_total",
            "Image files that blocked a decoding thread until another thread replaced it.",
            registry=registry,
        )
        self.decode_queue = Gauge(
            "convoy_decode_queued_images",
            "Image files that wait for a decoding thread or are being decoded.",
            registry=registry,
        )
        self.decode_queue_limit = Gauge(
            "convoy_decode_queue_limit_images",
            "Image files that may wait for a decoding thread or be decoded.",
            registry=registry,
        )
        self.rejected_tokens = Counter(
            "convoy_authentication_failures_total",
            "Requests without a valid token, by port.",
            ["port"],
            registry=registry,
        )

    def requests_of(self, model: str, version: int) -> "RequestMetrics":
        """Create the request metrics of one version."""
        return RequestMetrics(self._request_families, model, str(version))

    def forget(self, model: str, version: int) -> None:
        """Remove everything that is labeled with a version."""
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
            "convoy_outcomes_total", "Inference requests by outcome.", ["reason"]
        )
        self.in_slo = families.counter(
            "convoy_in_slo_requests_total",
            "Requests answered before their deadline, or without a deadline: the goodput.",
        )
        self.slack = families.histogram(
            "convoy_deadline_slack_seconds",
            "Time left until the deadline when the answer was ready; negative if it was late.",
            SLACK_BUCKETS_S,
        )
        self.decode = families.histogram(
            "convoy_decode_duration_seconds",
            "Time to decode the image files of a request, including the wait for a thread.",
            DURATION_BUCKETS_S,
        )
        self.decode_queue = families.histogram(
            "convoy_decode_queue_duration_seconds",
            "Time the image files of a request waited for a decoding thread.",
            DURATION_BUCKETS_S,
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
        if model:
            # Shown from the start: an autoscaler must distinguish "no decoding" from "no data".
            self._decode = families.decode.labels(*self._labels)
            self._decode_queue = families.decode_queue.labels(*self._labels)

    def close(self) -> None:
        """Create no new label sets: a late reply must not restore a version that was removed."""
        self._closed = True

    def finished(self, method: str, code: str, duration_s: float, trace_id: str = "") -> None:
        """Count an RPC that ended with a status code.

        Args:
            method: Its name.
            code: The status.
            duration_s: From its arrival.
            trace_id: Of its trace, which the bucket then shows as an exemplar; empty without one.
        """
        child = self._durations.get((method, code))
        if child is None:
            if self._closed:
                return
            child = self._families.duration.labels(*self._labels, method, code)
            self._durations[method, code] = child
        child.observe(duration_s, {"trace_id": trace_id} if trace_id else None)

    def decoded(self, duration_s: float, queued_s: float) -> None:
        """Count a request of a model whose image files were decoded, or are no longer wanted.

        Args:
            duration_s: From the request's turn until its pixels were decoded.
            queued_s: The part of it that its files waited for a thread.
        """
        self._decode.observe(duration_s)
        self._decode_queue.observe(queued_s)

    def outcome(self, outcome: Outcome, slack_s: float = float("inf")) -> None:
        """Count an inference request that ended.

        Args:
            outcome: How it ended.
            slack_s: The time left until its deadline; infinity without one.
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
    """What runs a version: the labels of convoy_model_info.

    Attributes:
        platform: The runtime's name in the Open Inference Protocol.
        device: The device as the runtime reports it; several are separated by commas.
        provider: The runtime's executor.
        precision: The precision of the artifact.
    """

    platform: str
    device: str
    provider: str
    precision: str


class ModelMetrics:
    """The metrics of models and their versions."""

    def __init__(self, families: VersionFamilies) -> None:
        registry = families.registry
        self._info = families.gauge(
            "convoy_model_info",
            "1 for each version in service, with the runtime, device and provider in use.",
            ["platform", "device", "provider", "precision"],
        )
        self._load_s = families.gauge(
            "convoy_model_load_seconds",
            "Time to load a version, including all checks.",
        )
        self._warmup_s = families.gauge("convoy_model_warmup_seconds", "Time to warm up a version.")
        self._loading = Gauge(
            "convoy_loading_versions",
            "Versions that are being loaded and checked.",
            ["model"],
            registry=registry,
        )
        self._swaps = Counter(
            "convoy_version_swaps_total",
            "Switches from one version to another.",
            ["model"],
            registry=registry,
        )
        self._rejections = Counter(
            "convoy_rejected_versions_total",
            "Versions that were rejected, by reason.",
            ["model", "reason"],
            registry=registry,
        )
        self._repository_errors = Counter(
            "convoy_repository_errors_total",
            "Errors of the storage of the repository, by the system's name of the error.",
            ["model", "error"],
            registry=registry,
        )
        self._rollbacks = Counter(
            "convoy_rollbacks_total",
            "Canaries that were rolled back, by reason.",
            ["model", "reason"],
            registry=registry,
        )

    def loading(self, model: str) -> AbstractContextManager[object]:
        """Return a context in which a version counts as being loaded."""
        return self._loading.labels(model).track_inprogress()

    def loaded(self, model: str, version: int, load_s: float, warmup_s: float) -> None:
        """Note that a version was loaded, warmed up and checked."""
        self._load_s.labels(model, version).set(load_s)
        self._warmup_s.labels(model, version).set(warmup_s)

    def serves(self, model: str, version: int, runs_on: RunsOn) -> None:
        """Note that a version is in service."""
        self._info.labels(
            model, version, runs_on.platform, runs_on.device, runs_on.provider, runs_on.precision
        ).set(1)

    def switched(self, model: str) -> None:
        """Count a switch from one version to another."""
        self._swaps.labels(model).inc()

    def rejected(self, model: str, reason: str) -> None:
        """Count a rejected version."""
        self._rejections.labels(model, reason).inc()

    def repository_error(self, model: str, code: str) -> None:
        """Count an error of the storage; an empty name stands for the whole repository."""
        self._repository_errors.labels(model, code).inc()

    def rolled_back(self, model: str, reason: str) -> None:
        """Count a canary that was rolled back."""
        self._rollbacks.labels(model, reason).inc()
