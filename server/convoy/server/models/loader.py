"""Load a version of the repository: verify, load, warm up and check its outputs."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import CudaOptions, Device, Runtime, TensorRt, batch_buffer
from convoy.server.batching import (
    BatchingLimits,
    BatchSizes,
    DynamicBatcher,
    InstanceThread,
    LatencyModel,
    Runner,
)
from convoy.server.batching.sizes import largest_size, preferred_size, smoothed
from convoy.server.errors import GraphError, RepositoryError
from convoy.server.metrics.batches import BatchFamilies, BatchObservers, ModelStatistics
from convoy.server.metrics.requests import RunsOn, ServerMetrics
from convoy.server.models.golden import (
    GoldenSamples,
    check_answers,
    check_decoding,
    examples,
    read_golden_samples,
)
from convoy.server.models.manifest import Artifact, Manifest, TensorSpec, parse_manifest
from convoy.server.models.registry import LoadedModel
from convoy.server.models.repository import ModelVersion, VerifiedFile, read_manifest_bytes
from convoy.server.models.signing import verify_signature
from convoy.server.models.warmup import warm_up

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How versions are loaded.

    Attributes:
        runtime: The runtime to run the artifact of its format with.
        devices: The devices, all of one kind; a version is loaded once for each.
        precision: Which artifact of the format: "fp32", "tf32", "fp16", "bf16" or "int8".
        threads: CPU threads for one batch.
        limits: The limits of a batcher; its batch size is an upper bound, its instances are those
            of all devices.
        slo_s: The time to answer a request in; it bounds the batch size too.
        public_key: Returns the key that must have signed every version; None requires no
            signature.
        cuda: How they run on CUDA; with graphs there is one instance for each device named.
        tensorrt: Run ONNX by TensorRT on CUDA.
        engines: Returns the folder that keeps TensorRT's engines of a version's folder; None where
            none may be kept.
        examples: Golden samples that the page may offer.
        warmup_s: How long the batch sizes are measured, beyond their first runs.
        batch_size: The size that batches are filled up to; 0 to choose it by these measurements.
    """

    runtime: Runtime
    devices: tuple[Device, ...]
    threads: int
    limits: BatchingLimits
    slo_s: float = float("inf")
    public_key: Callable[[], Ed25519PublicKey] | None = None
    examples: int = 0
    precision: str = "fp32"
    cuda: CudaOptions = field(default_factory=CudaOptions)
    tensorrt: bool = False
    engines: Callable[[Path], Path | None] = lambda folder: None
    warmup_s: float = 1.0
    batch_size: int = 0


class ModelLoader:
    """Loads versions; the caller starts their batchers on the event loop.

    Call it on another thread than the event loop's.

    Args:
        options: How to load them.
        metrics: Receives their metrics.
    """

    def __init__(self, options: LoadOptions, metrics: ServerMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._batches = BatchFamilies(metrics.families)

    def load(self, folder: Path) -> LoadedModel:
        """Load the version in a folder NAME/VERSION.

        It checks manifest, signature, digests, image files, graph, warm-up and golden outputs, in
        this order, the last three on every device. It reads every file once, so the bytes that were
        checked are those that run, whatever is written meanwhile.

        Raises:
            RepositoryError: A check failed; the class identifies it.
            DeviceError: The device cannot be used.
        """
        started_s = time.monotonic()
        with self._metrics.models.loading(folder.parent.name):
            manifest, artifact, file, golden = self._read(folder)
            cuda = self._cuda_options(folder, manifest, artifact)
            backends = self._load_backends(file, manifest, cuda)
            # The runtime has a copy of its own, and the warm-up takes memory too.
            del file
            try:
                return self._prepare(manifest, artifact, golden, backends, started_s)
            except BaseException:
                _close(backends)
                raise

    def _prepare(
        self,
        manifest: Manifest,
        artifact: Artifact,
        golden: GoldenSamples,
        backends: Sequence[Backend],
        started_s: float,
    ) -> LoadedModel:
        """Warm up and check a model that was loaded at `started_s`, and create its batcher."""
        options = self._options
        warming_s = time.monotonic()
        threads = [InstanceThread(number) for number in range(options.limits.instances)]
        # The instances of a GPU share it; on a CPU each has processors to itself.
        sharing = threads if options.devices[0].kind == "cuda" else threads[: len(backends)]
        latency = self._warm_up(backends, sharing, manifest)
        sizes = _batch_sizes(latency, options)
        limits = replace(
            options.limits,
            max_batch_size=sizes.largest.greatest,
            preferred_batch_size=sizes.preferred.size,
        )
        warmup_s = time.monotonic() - warming_s
        # A backend is run on the thread of its first instance.
        for backend, thread in zip(backends, threads, strict=False):
            check = partial(check_answers, golden, backend, manifest, artifact.tolerance, latency)
            thread.call(check).result()
        self._shrink(backends, sharing, latency.padded(limits.max_batch_size), manifest)
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
            threads=threads,
            sizes=sizes,
        )
        self._batches.queues.watch(manifest, batcher.snapshot)
        runs_on = _runs_on(backends, artifact)
        load_s = time.monotonic() - started_s
        self._metrics.models.loaded(manifest.name, manifest.version, load_s, warmup_s)
        logger.info(
            "model loaded",
            model=manifest.name,
            version=manifest.version,
            device=runs_on.device,
            provider=runs_on.provider,
            max_batch_size=sizes.largest.size,
            preferred_batch_size=sizes.preferred.size,
            load_s=round(load_s, 3),
        )
        requests = self._metrics.requests_of(manifest.name, manifest.version)
        return LoadedModel(
            manifest,
            options.runtime,
            runs_on,
            batcher,
            requests,
            statistics.read,
            examples=examples(golden, options.examples),
            backends=backends,
        )

    def _cuda_options(self, folder: Path, manifest: Manifest, artifact: Artifact) -> CudaOptions:
        options = self._options
        tf32 = artifact.precision == "tf32"
        if tf32 and options.devices[0].kind == "cpu":
            logger.warning(
                "no TF32 on a CPU: it computes in float32",
                model=manifest.name,
                version=manifest.version,
            )
        tensorrt = None
        if options.tensorrt:
            kept = options.engines(folder)
            size = options.limits.max_batch_size
            tensorrt = TensorRt(
                # TensorRT names engines by the graph, not by its weights.
                _made(kept / artifact.file.sha256) if kept else None,
                manifest.input.name,
                manifest.sample_shape,
                size,
                size,
                artifact.precision,
            )
        return replace(options.cuda, tf32=tf32, tensorrt=tensorrt)

    def _load_backends(
        self, file: VerifiedFile, manifest: Manifest, cuda: CudaOptions
    ) -> list[Backend]:
        """Load the artifact once for each device."""
        options = self._options
        backends: list[Backend] = []
        try:
            for device in options.devices:
                backend = load_backend(
                    options.runtime,
                    file,
                    device,
                    options.threads,
                    cuda,
                    instances=options.limits.instances // len(options.devices),
                )
                backends.append(backend)
                _check_graph(backend, manifest)
        except BaseException:
            _close(backends)
            raise
        return backends

    def _warm_up(
        self,
        backends: Sequence[Backend],
        threads: Sequence[InstanceThread],
        manifest: Manifest,
    ) -> LatencyModel:
        options = self._options
        try:
            return warm_up(
                backends,
                threads,
                manifest.sample_shape,
                options.batch_size or options.limits.max_batch_size,
                clock=_run_clock(options),
                allocate=partial(batch_buffer, options.devices[0]),
                budget_s=options.warmup_s,
                whole_range=bool(options.batch_size),
            )
        except Exception as error:  # the runtimes have no common exception type
            raise RepositoryError(
                f"model {manifest.name!r} version {manifest.version}: it cannot run a batch of "
                "zeros"
            ) from error

    def _shrink(
        self,
        backends: Sequence[Backend],
        threads: Sequence[InstanceThread],
        size: int,
        manifest: Manifest,
    ) -> None:
        """Give back the memory of larger batches than will be served, which the warm-up ran."""
        images = batch_buffer(self._options.devices[0], (size, *manifest.sample_shape))
        images.fill(0)
        for backend, thread in zip(backends, threads, strict=False):
            thread.call(partial(backend.release_unused, images[:1])).result()
        # All at once, so that the memory for that is there before the first request.
        runs = [
            thread.call(partial(backend.run, images))
            for backend, thread in zip(itertools.cycle(backends), threads, strict=False)
        ]
        for run in runs:
            run.result()

    def _read(self, folder: Path) -> tuple[Manifest, Artifact, VerifiedFile, GoldenSamples]:
        manifest_bytes = read_manifest_bytes(folder)
        manifest = parse_manifest(folder, manifest_bytes)
        artifact = manifest.artifact(self._options.runtime.format, self._options.precision)
        if self._options.public_key:
            verify_signature(folder, manifest_bytes, self._options.public_key())
        file, samples = ModelVersion(folder, manifest).read_files(artifact.file, manifest.samples)
        golden = read_golden_samples(samples, manifest)
        check_decoding(golden, manifest)
        return manifest, artifact, file, golden


def _made(folder: Path) -> Path | None:
    """Create the folder of an artifact's engines, for this user alone: engines hold code."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("TensorRT's engines are not kept", reason=error.strerror)
        return None
    return folder


def _run_clock(options: LoadOptions) -> Callable[[], float]:
    """Return the clock that times the runs of the warm-up.

    ONNX Runtime with one thread computes on the caller's. Its processor time is what a run takes
    undisturbed, and other work on the machine does not lengthen it.
    """
    on_caller = options.runtime is Runtime.ONNX_RUNTIME and options.threads == 1
    return time.thread_time if on_caller and options.devices[0].kind == "cpu" else time.perf_counter


def _batch_sizes(latency: LatencyModel, options: LoadOptions) -> BatchSizes:
    """Return the sizes that batches are filled up to."""
    times_s = latency.table_s
    if options.batch_size:
        # Less than that if a device has no memory for it, which the warm-up has logged.
        size = max(times_s)
        return BatchSizes(size, size)
    line_s = smoothed(times_s)
    preferred = preferred_size(line_s, options.slo_s)
    largest = largest_size(line_s, options.slo_s)
    # One larger size stays in reach, if it is allowed; the memory of others is released.
    allowed = [size for size in times_s if size <= largest or 2 * times_s[size] <= options.slo_s]
    return BatchSizes(preferred, largest, [size for size in allowed if size <= 2 * largest])


def _close(backends: Sequence[Backend]) -> None:
    for backend in backends:
        backend.close()


def _check_graph(backend: Backend, manifest: Manifest) -> None:
    """Compare the tensors that the graph declares, if any, with those of the manifest."""
    where = f"model {manifest.name!r} version {manifest.version}"
    for kind, declared, described in (
        ("input", backend.inputs, (manifest.input,)),
        ("output", backend.outputs, manifest.outputs),
    ):
        if declared and sorted(map(str, declared)) != sorted(map(str, described)):
            raise GraphError(
                f"{where}: {kind}: the manifest describes {_listed(described)}, "
                f"the graph has {_listed(declared)}"
            )


def _listed(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in tensors)


def _runs_on(backends: Sequence[Backend], artifact: Artifact) -> RunsOn:
    devices = ",".join(backend.device for backend in backends)
    return RunsOn(backends[0].platform, devices, backends[0].provider, artifact.precision)
