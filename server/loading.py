"""Brings a version of the repository into service: verify, load, warm up, check its answers."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from server.backends import Backend, load_backend
from server.backends.devices import Device
from server.batch_metrics import BatchFamilies
from server.batcher import BatchingLimits, DynamicBatcher
from server.errors import VerificationError
from server.manifest import ArtefactFormat, Manifest
from server.metrics import RequestMetrics, RunsOn, ServerMetrics
from server.repository import ModelVersion
from server.signing import verify_signature
from server.warmup import warm_up

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How versions are loaded.

    Attributes:
        format: The artefact to run.
        threads: CPU threads for one batch.
        limits: What a batcher may hold; its batch size is an upper bound.
        slo_s: In which time a request is to be answered; bounds the batch size too.
        public_key: Whose signature every version must bear; None asks for none.
    """

    format: ArtefactFormat
    device: Device
    threads: int
    limits: BatchingLimits
    slo_s: float = float("inf")
    public_key: Ed25519PublicKey | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A version in service.

    Attributes:
        manifest: What it says about itself.
        format: The artefact in use.
        backend: What runs it.
        batcher: Where its requests go.
        requests: Counts them.
    """

    manifest: Manifest
    format: ArtefactFormat
    backend: Backend
    batcher: DynamicBatcher
    requests: RequestMetrics

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version

    @property
    def runs_on(self) -> RunsOn:
        """What really runs it."""
        precision = self.manifest.artefact(self.format).precision
        backend = self.backend
        return RunsOn(backend.platform, backend.device, backend.provider, precision)


class ModelLoader:
    """Loads versions, each with a batcher that still has to be started on the event loop.

    Args:
        options: How to load them.
        metrics: Where they report to.
    """

    def __init__(self, options: LoadOptions, metrics: ServerMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._batches = BatchFamilies(metrics.families)

    def load(self, version: ModelVersion) -> ServedModel:
        """Loads a version.

        Raises:
            RepositoryError: The signature is missing or wrong, a file differs from the manifest or
                cannot be loaded, or its answers differ.
            DeviceError: The device cannot be used.
        """
        options = self._options
        started_s = time.monotonic()
        manifest = version.manifest
        if options.public_key:
            verify_signature(version.folder, options.public_key)
        artefact = manifest.artefact(options.format)
        samples = version.verified_file(manifest.samples)
        path = version.verified_file(artefact.file)
        backend = load_backend(options.format, path, options.device, options.threads)
        warming_s = time.monotonic()
        latency = warm_up(backend, manifest.sample_shape, options.limits.max_batch_size)
        limits = replace(options.limits, max_batch_size=latency.best_size(options.slo_s))
        warmup_s = time.monotonic() - warming_s
        _check_golden_samples(backend, manifest, samples, artefact.tolerance)
        observer = self._batches.observer(manifest, limits)
        batcher = DynamicBatcher(
            backend.run, manifest.sample_shape, limits, observer, latency=latency
        )
        observer.follow(batcher.snapshot)
        load_s = time.monotonic() - started_s
        self._metrics.models.loaded(manifest.name, manifest.version, load_s, warmup_s)
        logger.info(
            "model loaded",
            model=manifest.name,
            version=manifest.version,
            device=backend.device,
            provider=backend.provider,
            max_batch_size=limits.max_batch_size,
            load_s=round(load_s, 3),
        )
        requests = self._metrics.requests_of(manifest.name, manifest.version)
        return ServedModel(manifest, options.format, backend, batcher, requests)


def _check_golden_samples(
    backend: Backend, manifest: Manifest, samples: Path, tolerance: float
) -> None:
    """Compares the answers on this device with those of the net that was exported."""
    with np.load(samples, allow_pickle=False) as golden:
        images, expected = golden["images"], golden["logits"]
    difference = float(np.abs(backend.run(images).logits - expected).max())
    # The negation also catches NaN.
    if not difference <= tolerance:
        raise VerificationError(
            f"model {manifest.name!r} version {manifest.version}: logits of the golden samples "
            f"differ by {difference:.2g} on {backend.device}, expected at most {tolerance:.2g}"
        )
