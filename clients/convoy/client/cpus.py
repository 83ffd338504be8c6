"""The processors that this process may use.

Server, client and training each have this file, which a test holds equal: runtimes look neither at
the affinity nor at the quota of a container, and would start a thread per core of the host.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def usable_cpus(proc: Path = _PROC) -> int:
    """Return how many whole processors this process may use: its affinity and cgroup quotas.

    Args:
        proc: Where the kernel describes this process.
    """
    quotas = [quota for quota in _quotas(proc) if quota]
    return max(1, min([len(os.sched_getaffinity(0)), *map(int, quotas)]))


def _quotas(proc: Path) -> Iterator[float]:
    """Yield the quota of every cgroup that this process is in, in processors; 0 for none."""
    for mount, root, path, version in _cgroups(proc):
        # A group within another is bounded by both. Inside a container its own group is the root of
        # the mount, whatever the path says.
        is_below = Path(path).is_relative_to(root) and ".." not in Path(path).parts
        inside = Path(path).relative_to(root) if is_below else Path()
        for folder in (mount / inside, *(mount / inside).parents):
            if folder.is_relative_to(mount):
                yield _quota_v2(folder) if version == "cgroup2" else _quota_v1(folder)


def _cgroups(proc: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield mount point, mounted root, path and file system of the groups that bound processors."""
    paths = {}
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(proc / "mountinfo"):
        # man 5 proc_pid_mountinfo: the optional fields in the middle end with a dash.
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind in paths and (kind == "cgroup2" or "cpu" in options.split(",")):
            root, mount = fields.split(" ")[3:5]
            yield Path(mount), root, paths[kind], kind


def _quota_v2(folder: Path) -> float:
    for line in _lines(folder / "cpu.max"):
        quota, period = line.split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    return 0.0


def _quota_v1(folder: Path) -> float:
    quota, period = (_lines(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return max(0.0, int(quota[0]) / int(period[0])) if quota and period else 0.0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
