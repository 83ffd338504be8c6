"""Brings a version of the repository into service: verify, load, warm up, check its answers."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from server.backends import Backend, load_backend
from server.backends.buffers import batch_buffer
from server.backends.devices import Device
from server.backends.runtimes import Runtime
from server.batch_metrics import BatchFamilies
from server.batcher import BatchingLimits, DynamicBatcher, LatencyModel, Runner
from server.errors import GraphError, RepositoryError
from server.golden import GoldenSamples, check_answers, check_decoding, read_golden_samples
from server.manifest import (
    Artefact,
    Manifest,
    TensorSpec,
    parse_manifest,
    read_manifest_bytes,
)
from server.metrics import RunsOn, ServerMetrics
from server.observers import BatchObservers
from server.repository import ModelVersion, VerifiedFile
from server.served_model import LoadedModel
from server.signing import verify_signature
from server.statistics import ModelStatistics
from server.warmup import warm_up

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How versions are loaded.

    Attributes:
        runtime: What runs the artefact of its format.
        devices: Where to run it, of one kind; it is loaded once for each.
        precision: Which of that format's artefacts: "fp32", "fp16", "bf16" or "int8".
        threads: CPU threads for one batch.
        limits: What a batcher may hold; its batch size is an upper bound, its instances are those
            of all devices.
        slo_s: In which time a request is to be answered; bounds the batch size too.
        public_key: Whose signature every version must bear; None asks for none.
        cuda_graphs: Whether ONNX Runtime captures and replays a CUDA graph for each batch size.
    """

    runtime: Runtime
    devices: tuple[Device, ...]
    threads: int
    limits: BatchingLimits
    slo_s: float = float("inf")
    public_key: Ed25519PublicKey | None = None
    precision: str = "fp32"
    cuda_graphs: bool = False


class ModelLoader:
    """Loads versions, step by step, each with a batcher that is still to be started on the loop.

    Nothing here belongs to the event loop; call it on another thread.

    Args:
        options: How to load them.
        metrics: Where they report to.
    """

    def __init__(self, options: LoadOptions, metrics: ServerMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._batches = BatchFamilies(metrics.families)

    def load(self, folder: Path) -> LoadedModel:
        """Loads the version in a folder NAME/VERSION.

        Manifest, signature, digests, golden pictures, graph, warm-up and golden answers are checked
        in this order, the last three on every device. Every file is read once, so what was checked
        is what runs, whatever is written meanwhile.

        Raises:
            RepositoryError: One of them is not as it should be; the class tells which.
            DeviceError: The device cannot be used.
        """
        options = self._options
        started_s = time.monotonic()
        manifest, artefact, file, golden = self._read(folder)
        backends = self._load_backends(file, manifest)
        # The runtime has made its own of it, and warming up takes memory too.
        del file
        warming_s = time.monotonic()
        latency = self._warm_up(backends, manifest)
        limits = replace(
            options.limits,
            max_batch_size=latency.largest_size(options.slo_s),
            preferred_batch_size=latency.preferred_size(options.slo_s),
        )
        warmup_s = time.monotonic() - warming_s
        for backend in backends:
            check_answers(golden, backend, manifest, artefact.tolerance)
        observer = self._batches.observer(manifest, limits)
        statistics = ModelStatistics()
        runners = [
            Runner(backend.run, partial(batch_buffer, device))
            for backend, device in zip(backends, options.devices, strict=True)
        ]
        batcher = DynamicBatcher(
            runners,
            manifest.sample_shape,
            limits,
            BatchObservers(observer, statistics),
            latency=latency,
        )
        observer.follow(batcher.snapshot)
        runs_on = _runs_on(backends, artefact)
        load_s = time.monotonic() - started_s
        self._metrics.models.loaded(manifest.name, manifest.version, load_s, warmup_s)
        logger.info(
            "model loaded",
            model=manifest.name,
            version=manifest.version,
            device=runs_on.device,
            provider=runs_on.provider,
            max_batch_size=limits.max_batch_size,
            preferred_batch_size=limits.preferred_batch_size,
            load_s=round(load_s, 3),
        )
        requests = self._metrics.requests_of(manifest.name, manifest.version)
        return LoadedModel(manifest, options.runtime, runs_on, batcher, requests, statistics.read)

    def _load_backends(self, file: VerifiedFile, manifest: Manifest) -> list[Backend]:
        """Loads the artefact once for each device."""
        options = self._options
        backends = [
            load_backend(
                options.runtime,
                file,
                device,
                options.threads,
                options.cuda_graphs,
                instances=options.limits.instances // len(options.devices),
            )
            for device in options.devices
        ]
        for backend in backends:
            _check_graph(backend, manifest)
        return backends

    def _warm_up(self, backends: Sequence[Backend], manifest: Manifest) -> LatencyModel:
        options = self._options
        # The instances of a GPU share it; on a CPU each has processors of its own.
        shared = options.devices[0].kind == "cuda"
        try:
            return warm_up(
                backends,
                options.limits.instances if shared else len(backends),
                manifest.sample_shape,
                options.limits.max_batch_size,
                allocate=partial(batch_buffer, options.devices[0]),
            )
        except Exception as error:  # the runtimes have no common exception type
            raise RepositoryError(
                f"model {manifest.name!r} version {manifest.version}: it cannot run a batch of "
                "zeros"
            ) from error

    def _read(self, folder: Path) -> tuple[Manifest, Artefact, VerifiedFile, GoldenSamples]:
        manifest_bytes = read_manifest_bytes(folder)
        manifest = parse_manifest(folder, manifest_bytes)
        artefact = manifest.artefact(self._options.runtime.format, self._options.precision)
        if self._options.public_key:
            verify_signature(folder, manifest_bytes, self._options.public_key)
        file, samples = ModelVersion(folder, manifest).read_files(artefact.file, manifest.samples)
        golden = read_golden_samples(samples, manifest)
        check_decoding(golden, manifest)
        return manifest, artefact, file, golden


def _check_graph(backend: Backend, manifest: Manifest) -> None:
    """Compares what the graph declares, where it does, with what the manifest promises."""
    where = f"model {manifest.name!r} version {manifest.version}"
    for kind, declared, promised in (
        ("input", backend.inputs, (manifest.input,)),
        ("output", backend.outputs, manifest.outputs),
    ):
        if declared and sorted(map(str, declared)) != sorted(map(str, promised)):
            raise GraphError(
                f"{where}: {kind}: the manifest describes {_listed(promised)}, "
                f"the graph has {_listed(declared)}"
            )


def _listed(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in tensors)


def _runs_on(backends: Sequence[Backend], artefact: Artefact) -> RunsOn:
    devices = ",".join(backend.device for backend in backends)
    return RunsOn(backends[0].platform, devices, backends[0].provider, artefact.precision)
