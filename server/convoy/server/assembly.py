"""Create the parts that answer requests from the settings, in the server and its front ends."""

import asyncio
import contextlib
import hashlib
import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from convoy.server.backends.device import CudaOptions, Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.cpus import usable_cpus
from convoy.server.edge.limits import ByteBudget, ConnectionLimits, MessageLimits, window_bytes
from convoy.server.edge.listener import ListenerOptions
from convoy.server.errors import RepositoryError, StartupError
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.images.decoding import Decoded, DecodeThreads, ImageDecoder
from convoy.server.metrics.mirror import MirrorMetrics
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.canary import CanaryLimits, VerdictRecords
from convoy.server.models.loader import LoadOptions
from convoy.server.models.manifest import Manifest
from convoy.server.models.mirror import MirroredRepository
from convoy.server.models.registry import Models, ServedModel
from convoy.server.models.repository import ModelFolder, ModelRepository, read_manifest
from convoy.server.models.signing import read_public_key, read_record_key
from convoy.server.models.store import ObjectStore, is_url
from convoy.server.security.tls import FollowedFiles
from convoy.server.settings import ServerSettings

if TYPE_CHECKING:
    from convoy.server.telemetry import Tracing

logger = structlog.get_logger()

MIB = 1024 * 1024
# The size of a request without its pixels: names, shapes, parameters.
MESSAGE_OVERHEAD_BYTES = 64 * 1024
# Larger batches gain no throughput that is worth their latency, on any device.
_MAX_BATCH_SIZE = 256


def open_repository(settings: ServerSettings, metrics: ServerMetrics) -> ModelRepository:
    """Return the model repository: a folder, or the mirror of one in a store.

    Raises:
        StartupError: The URL cannot be used, or the folder of its mirror.
    """
    url = settings.repository
    if not is_url(url):
        return ModelRepository(Path(url))
    cache = settings.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "convoy"
    return MirroredRepository(
        ObjectStore(url),
        # A folder for each repository, so that another URL does not remove this one's copies.
        cache.expanduser() / f"mirror-{hashlib.sha256(url.encode()).hexdigest()[:12]}",
        int(settings.cache_mib * MIB),
        MirrorMetrics(metrics.registry),
        lambda error: metrics.models.repository_error("", error.code),
    )


def canary_limits(settings: ServerSettings) -> CanaryLimits | None:
    """Return the limits of a canary; None without one."""
    if not settings.canary_share:
        return None
    return CanaryLimits(
        settings.canary_share,
        settings.canary_requests,
        settings.canary_timeout_s,
        max_error_ratio=settings.canary_max_error_ratio,
        max_slowdown=settings.canary_max_slowdown,
        max_disagreement=settings.canary_max_disagreement,
    )


def verdict_records(settings: ServerSettings) -> VerdictRecords | None:
    """Return the records of canary verdicts; None if they could not be verified.

    Raises:
        StartupError: The key for records cannot be read, or is needed and missing.
    """
    if settings.require_signature and not settings.record_key:
        if settings.state_dir:
            raise StartupError("--state-dir: with --require-signature, expected --record-key too")
        if settings.canary_share:
            logger.warning(
                "canary verdicts are not recorded: --require-signature needs --record-key"
            )
        return None
    key = read_record_key(settings.record_key) if settings.record_key else None
    return VerdictRecords(settings.state_dir, key)


def message_limits(settings: ServerSettings, models: Models, least_bytes: int = 0) -> MessageLimits:
    """Return limits that stay as large as the largest request for a model in service needs.

    A part of --max-buffered-mib bounds them: if a model has large images, fewer than
    --max-request-images fit into a request.

    Args:
        settings: Of the server.
        models: The models in service.
        least_bytes: The limit for messages with images is never lower.
    """
    least_bytes = max(int(settings.max_message_mib * MIB), least_bytes)
    limits = MessageLimits(least_bytes, MESSAGE_OVERHEAD_BYTES)

    def follow() -> None:
        sizes = (request_bytes(settings.max_request_images, model.manifest) for model in models)
        largest_bytes = min(max(sizes, default=0), most_message_bytes(settings))
        limits.images_bytes = max(least_bytes, largest_bytes)

    models.watch(follow)
    return limits


def warn_of_large_images(settings: ServerSettings, models: Models) -> None:
    """Log each version in service that the largest request of the settings is too large for."""
    warned: set[ServedModel] = set()

    def look() -> None:
        for model in set(models) - warned:
            needed_bytes = request_bytes(settings.max_request_images, model.manifest)
            if needed_bytes > most_message_bytes(settings):
                warned.add(model)
                logger.warning(
                    "the largest request exceeds a quarter of --max-buffered-mib",
                    model=model.name,
                    version=model.version,
                    images=settings.max_request_images,
                    needed_mib=round(needed_bytes / MIB, 1),
                    limit_mib=round(most_message_bytes(settings) / MIB, 1),
                )
        warned.intersection_update(models)

    models.watch(look)


def most_message_bytes(settings: ServerSettings) -> int:
    """Return the largest size of a message, of which the budget must hold a few."""
    return _buffered_bytes(settings) // 2 // _MIN_LARGEST_REQUESTS


def request_bytes(images: int, manifest: Manifest) -> int:
    """Return the size of a request with `images` images of a model."""
    return images * math.prod(manifest.sample_shape) + MESSAGE_OVERHEAD_BYTES


def largest_request_bytes(settings: ServerSettings, repository: ModelRepository) -> int:
    """Return the size of the largest request for the largest images of the repository's models."""
    folders: list[ModelFolder] = []
    # The manager reports a repository that cannot be read, and one without a model.
    with contextlib.suppress(RepositoryError):
        folders = repository.models()
    largest = 0
    for folder in folders:
        for version in folder.versions:
            # A manifest that cannot be read is reported where the version is loaded.
            with contextlib.suppress(RepositoryError):
                manifest = read_manifest(folder.version(version))
                largest = max(largest, request_bytes(settings.max_request_images, manifest))
    return min(largest, most_message_bytes(settings))


def _automatic_instances(settings: ServerSettings, device: Device, cpus: int) -> int:
    if device.kind == "cpu":
        return min(2, cpus)
    # The copies of one overlap the work of the other; with graphs each instance loads the model.
    return 1 if settings.cuda_graphs else 2


def trusted_key(settings: ServerSettings) -> FollowedFiles[Ed25519PublicKey] | None:
    """Return the key that must have signed every version, if the settings name one.

    Raises:
        StartupError: It cannot be read.
    """
    path = settings.require_signature
    if path is None:
        return None
    return FollowedFiles([path], partial(read_public_key, path), "--require-signature")


def check_provider(settings: ServerSettings, devices: tuple[Device, ...]) -> None:
    """Check that the settings of CUDA go together.

    Raises:
        StartupError: They do not.
    """
    if settings.provider != "tensorrt":
        return
    if settings.backend != "onnx":
        raise StartupError(
            f"--provider tensorrt: expected --backend onnx, got {settings.backend!r}"
        )
    if settings.cuda_graphs:
        raise StartupError(
            "--provider tensorrt: expected no --cuda-graphs, which it cannot capture"
        )
    if devices[0].kind == "cpu":
        raise StartupError(
            "--provider tensorrt: expected a CUDA device, the server runs on the CPU"
        )


def load_options(
    settings: ServerSettings,
    devices: tuple[Device, ...],
    key: FollowedFiles[Ed25519PublicKey] | None = None,
) -> LoadOptions:
    """Return how versions are loaded and batched.

    Args:
        settings: Of the server.
        devices: To load them on.
        key: The key that must have signed them.
    """
    cpus = usable_cpus()
    on_each = settings.instances or _automatic_instances(settings, devices[0], cpus)
    instances = on_each * len(devices)
    if settings.cuda_graphs:
        # A session with graphs belongs to one thread.
        devices *= on_each
    limits = BatchingLimits(
        max_batch_size=settings.max_batch_size or _MAX_BATCH_SIZE,
        max_queue_size=settings.max_queue_size,
        max_queue_delay_s=settings.max_queue_delay_ms / 1000,
        instances=instances,
        max_queue_bytes=int(settings.max_queue_mib * MIB),
        max_request_images=settings.max_request_images,
        max_client_share=settings.max_client_share,
        hang_timeout_s=settings.hang_timeout_s,
    )
    return LoadOptions(
        Runtime(settings.backend),
        devices,
        threads=max(1, cpus // instances),
        limits=limits,
        slo_s=settings.slo_s,
        public_key=key.current if key else None,
        precision=settings.precision,
        cuda=CudaOptions(graphs=settings.cuda_graphs),
        tensorrt=settings.provider == "tensorrt",
        engines=partial(_engines, settings),
        examples=settings.ui_examples if settings.ui else 0,
        warmup_s=settings.warmup_s,
        batch_size=settings.batch_size,
    )


def _engines(settings: ServerSettings, folder: Path) -> Path | None:
    """Return the folder that keeps TensorRT's engines of the version in a folder NAME/VERSION.

    Nothing signs an engine, which is code: where signatures are required, the repository is no
    place to load one from.
    """
    name = f"{folder.name}.engines"
    if settings.state_dir:
        return settings.state_dir / folder.parent.name / name
    if settings.require_signature:
        logger.warning("TensorRT's engines are not kept: --require-signature needs --state-dir")
        return None
    return folder.parent / name


# The number of largest requests that the budget must hold.
_MIN_LARGEST_REQUESTS = 2


def call_boundary(
    settings: ServerSettings, metrics: ServerMetrics, tracing: "Tracing | None"
) -> GrpcBoundary:
    """Return the boundary that turns errors into status codes."""
    return GrpcBoundary(
        metrics,
        slo_s=settings.slo_s,
        tells_clients_apart=settings.max_client_share < 1,
        trace_id=tracing.trace_id if tracing else None,
    )


def byte_budget(settings: ServerSettings, max_message_bytes: int) -> ByteBudget:
    """Return the bound on the bytes that all requests hold.

    Raises:
        StartupError: It would not hold a few of the largest requests.
    """
    budget_bytes = _buffered_bytes(settings) // 2
    least_bytes = _MIN_LARGEST_REQUESTS * max_message_bytes
    if budget_bytes < least_bytes:
        raise StartupError(
            f"--max-buffered-mib: expected at least {2 * least_bytes / MIB:.0f}, four times the "
            f"largest message, got {settings.max_buffered_mib:g}"
        )
    return ByteBudget(budget_bytes)


def listener_options(
    settings: ServerSettings, streaming_paths: tuple[str, ...] = ()
) -> ListenerOptions:
    """Return the options of the port for callers."""
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        window_bytes=window_bytes(_buffered_bytes(settings), settings.max_connections),
        idle_s=settings.max_connection_idle_s,
        age_s=settings.max_connection_age_s,
    )
    return ListenerOptions(limits, streaming_paths, settings.drain_timeout_s, settings.log_format)


def image_decoder(
    settings: ServerSettings,
    processors: int,
    metrics: ServerMetrics,
    cleanup: contextlib.AsyncExitStack,
) -> ImageDecoder:
    """Return a decoder with a thread for each processor."""
    threads = DecodeThreads[Decoded](processors, on_slow=metrics.slow_decodes.inc)
    cleanup.push_async_callback(asyncio.to_thread, threads.close)
    limit = settings.max_queue_size
    decoder = ImageDecoder(threads, processors, settings.max_image_pixels, limit)
    metrics.decode_queue.set_function(lambda: decoder.queued)
    metrics.decode_queue_limit.set(limit)
    return decoder


def open_tracing(settings: ServerSettings, cleanup: contextlib.AsyncExitStack) -> "Tracing | None":
    """Return the tracer of requests, if the settings enable traces.

    Raises:
        StartupError: The extra that sends them is not installed.
    """
    if not settings.otlp_endpoint:
        return None
    try:
        from convoy.server.telemetry import Tracing
    except ImportError as error:
        raise StartupError("--otlp-endpoint: expected the extra otel installed") from error
    tracing = Tracing(settings.otlp_endpoint, settings.otlp_protocol)
    cleanup.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing


def _buffered_bytes(settings: ServerSettings) -> int:
    return int(settings.max_buffered_mib * MIB)
