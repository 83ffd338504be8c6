"""Makes what answers requests as the settings ask for it, in the server and in its front ends."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from server.access import AccessFiles
from server.decoding import ImageDecoder
from server.errors import StartupError
from server.metrics import ServerMetrics
from server.protocols.calls import CallBoundary
from server.settings import ServerSettings

if TYPE_CHECKING:
    from server.telemetry import Tracing


def access_files(settings: ServerSettings) -> AccessFiles:
    """Returns where the credentials of the ports for requests lie."""
    return AccessFiles(
        settings.tls_certificate, settings.tls_key, settings.tls_client_ca, settings.token_file
    )


def call_boundary(settings: ServerSettings, metrics: ServerMetrics) -> CallBoundary:
    """Returns where errors become status codes."""
    return CallBoundary(
        metrics, slo_s=settings.slo_s, tells_clients_apart=settings.max_client_share < 1
    )


def image_decoder(
    settings: ServerSettings, processors: int, cleanup: contextlib.AsyncExitStack
) -> ImageDecoder:
    """Returns a decoder with a thread for each processor."""
    threads = ThreadPoolExecutor(processors, thread_name_prefix="decode")
    cleanup.enter_context(threads)
    return ImageDecoder(threads, processors, settings.max_image_pixels, settings.max_queue_size)


def open_tracing(settings: ServerSettings, cleanup: contextlib.AsyncExitStack) -> "Tracing | None":
    """Returns what traces requests, if traces are asked for.

    Raises:
        StartupError: The extra that sends them is not installed.
    """
    if not settings.otlp_endpoint:
        return None
    try:
        from server.telemetry import Tracing
    except ImportError as error:
        raise StartupError("--otlp-endpoint: expected the extra otel installed") from error
    tracing = Tracing(settings.otlp_endpoint)
    cleanup.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing
