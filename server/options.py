"""What the settings mean for loading, batching and trying versions."""

import contextlib
import math

from server.backends.devices import Device, usable_cpus
from server.backends.runtimes import Runtime
from server.batcher import BatchingLimits
from server.canary import CanaryLimits
from server.errors import ManifestError
from server.loading import LoadOptions
from server.manifest import read_manifest
from server.repository import ModelFolder
from server.settings import ServerSettings
from server.signing import read_public_key

_MIB = 1024 * 1024
# What a request carries beside its pixels: names, shapes, parameters.
MESSAGE_OVERHEAD_BYTES = 64 * 1024
# Larger batches bring no device a better pace that is worth their latency.
_MAX_BATCH_SIZE = 256


def canary_limits(settings: ServerSettings) -> CanaryLimits | None:
    """Returns how a newer version is tried; None where it takes over at once."""
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


def max_message_bytes(settings: ServerSettings, folders: list[ModelFolder]) -> int:
    """Returns what the largest request for the largest images that lie there takes."""
    largest = max(map(_largest_sample_bytes, folders))
    largest_request = settings.max_request_images * largest + MESSAGE_OVERHEAD_BYTES
    return max(int(settings.max_message_mb * _MIB), largest_request)


def _largest_sample_bytes(folder: ModelFolder) -> int:
    largest = 0
    for version in folder.versions:
        # A manifest that cannot be read is reported where the version is loaded.
        with contextlib.suppress(ManifestError):
            shape = read_manifest(folder.version(version)).sample_shape
            largest = max(largest, math.prod(shape))
    return largest


def _automatic_instances(settings: ServerSettings, device: Device, cpus: int) -> int:
    if device.kind == "cpu":
        return min(2, cpus)
    # Of two the one's transfers overlap the other's work; a session with graphs runs one at a time.
    return 1 if settings.cuda_graphs else 2


def load_options(settings: ServerSettings, devices: tuple[Device, ...]) -> LoadOptions:
    """Returns how versions are loaded and batched.

    Raises:
        StartupError: The key for signatures cannot be read.
    """
    cpus = usable_cpus()
    on_each = settings.instances or _automatic_instances(settings, devices[0], cpus)
    instances = on_each * len(devices)
    limits = BatchingLimits(
        max_batch_size=settings.max_batch_size or _MAX_BATCH_SIZE,
        max_queue_size=settings.max_queue_size,
        max_queue_delay_s=settings.max_queue_delay_ms / 1000,
        instances=instances,
        max_queue_bytes=int(settings.max_queue_mb * _MIB),
        max_request_images=settings.max_request_images,
        max_client_share=settings.max_client_share,
        hang_timeout_s=settings.hang_timeout_s,
    )
    required = settings.require_signature
    return LoadOptions(
        Runtime(settings.backend),
        devices,
        threads=max(1, cpus // instances),
        limits=limits,
        slo_s=settings.slo_s,
        public_key=read_public_key(required) if required else None,
        precision=settings.precision,
        cuda_graphs=settings.cuda_graphs,
    )
