"""The metrics of a repository that is mirrored from a store."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class MirrorMetrics:
    """The metrics of the copies on this machine.

    Attributes:
        listed: The time of the last listing of the store, in seconds since 1970.
        fetched_bytes: Counts the bytes read from the store.
        copies_bytes: The size of the copies.
        evicted: Counts the versions whose copies were removed to make room.
        damaged: Counts the copies that no longer had the digest of their manifest.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.listed = Gauge(
            "convoy_mirror_last_listing_timestamp_seconds",
            "Time of the last listing of the repository's store, in seconds since 1970.",
            registry=registry,
        )
        self.fetched_bytes = Counter(
            "convoy_mirror_fetched_bytes_total",
            "Bytes that the server read from files in the store of the repository.",
            registry=registry,
        )
        self.copies_bytes = Gauge(
            "convoy_mirror_copies_bytes",
            "Size of the copies of versions in --cache-dir.",
            registry=registry,
        )
        self.evicted = Counter(
            "convoy_mirror_evicted_versions_total",
            "Versions whose copies the server removed to make room for others.",
            registry=registry,
        )
        self.damaged = Counter(
            "convoy_mirror_damaged_files_total",
            "Copies that no longer matched the digest in their manifest and were fetched again.",
            registry=registry,
        )
