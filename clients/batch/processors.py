"""The processors that this process may use."""

import os
from pathlib import Path


def usable_cpus() -> int:
    """Whole processors this process may use: its affinity, further bounded by a cgroup v2 quota.

    ONNX Runtime looks at neither and would start a thread per core of the host.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
