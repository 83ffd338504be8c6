"""The processors that a process may use, in the groups that kernels and containers show."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import convoy.client.cpus
import convoy.server.cpus
import convoy.training.cpus
from convoy.server import cpus
from convoy.server.cpus import usable_cpus

MANY = frozenset(range(64))


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: MANY)


def kernel(root: Path, group: str, mounts: list[tuple[str, str, str]], **quotas: str) -> Path:
    """Writes what the kernel tells of a process, and the files of its groups.

    Args:
        root: Where to.
        group: The content of /proc/self/cgroup.
        mounts: For each mount its root, its folder and the end of its line in mountinfo.
        quotas: The content of files, by their paths with two underscores for a slash.
    """
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "cgroup").write_text(group)
    lines = [
        f"31 23 0:28 {inside} {root / folder} rw,relatime shared:9 - {kind}\n"
        for inside, folder, kind in mounts
    ]
    lines.append("22 1 0:20 / /proc rw - proc proc rw\n")
    (root / "proc" / "mountinfo").write_text("".join(lines))
    for name, content in quotas.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "proc"


V2 = [("/", "cg", "cgroup2 cgroup2 rw,nsdelegate")]
V1 = [
    ("/docker/abc", "cg/cpu", "cgroup cgroup rw,cpu,cpuacct"),
    ("/docker/abc", "cg/cpuset", "cgroup cgroup rw,cpuset"),
]
V1_GROUP = "5:cpuset:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("group", "mounts", "quotas", "expected"),
    [
        pytest.param("0::/\n", V2, {}, 64, id="none"),
        pytest.param("0::/\n", V2, {"cg__cpu_max": "max 100000\n"}, 64, id="v2 without a bound"),
        pytest.param("0::/\n", V2, {"cg__cpu_max": "300000 100000\n"}, 3, id="v2"),
        pytest.param("0::/\n", V2, {"cg__cpu_max": "250000 100000\n"}, 2, id="v2, a half more"),
        pytest.param("0::/\n", V2, {"cg__cpu_max": "50000 100000\n"}, 1, id="v2, less than one"),
        pytest.param(
            "0::/system.slice/convoy.service\n",
            V2,
            {
                "cg__system.slice__cpu_max": "200000 100000\n",
                "cg__system.slice__convoy.service__cpu_max": "800000 100000\n",
            },
            2,
            id="v2, bound by the outer group",
        ),
        pytest.param(
            "0::/outer/inner\n",
            V2,
            {
                "cg__outer__cpu_max": "800000 100000\n",
                "cg__outer__inner__cpu_max": "400000 100000\n",
            },
            4,
            id="v2, bound by the inner group",
        ),
        pytest.param(
            "0::/../elsewhere\n", V2, {"cg__cpu_max": "600000 100000\n"}, 6, id="v2, outside"
        ),
        pytest.param(
            V1_GROUP,
            V1,
            {
                "cg__cpu__cpu_cfs_quota_us": "150000\n",
                "cg__cpu__cpu_cfs_period_us": "50000\n",
            },
            3,
            id="v1 in a container",
        ),
        pytest.param(
            V1_GROUP,
            V1,
            {"cg__cpu__cpu_cfs_quota_us": "-1\n", "cg__cpu__cpu_cfs_period_us": "100000\n"},
            64,
            id="v1 without a bound",
        ),
        pytest.param(
            "4:cpu,cpuacct:/a/b\n0::/\n",
            [("/", "cg/cpu", "cgroup cgroup rw,cpu"), ("/", "cg/unified", "cgroup2 cgroup2 rw")],
            {
                "cg__cpu__a__cpu_cfs_quota_us": "500000\n",
                "cg__cpu__a__cpu_cfs_period_us": "100000\n",
                "cg__cpu__a__b__cpu_cfs_quota_us": "700000\n",
                "cg__cpu__a__b__cpu_cfs_period_us": "100000\n",
            },
            5,
            id="v1 beside v2",
        ),
    ],
)
def test_quotas_of_all_groups_bound(tmp_path, group, mounts, quotas, expected):
    assert usable_cpus(kernel(tmp_path, group, mounts, **quotas)) == expected


def test_a_system_that_tells_nothing_bounds_nothing(tmp_path):
    assert usable_cpus(tmp_path) == len(MANY)


def test_the_affinity_bounds_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    quotas = {"cg__cpu_max": "800000 100000\n"}
    assert usable_cpus(kernel(tmp_path, "0::/\n", V2, **quotas)) == 2


def test_the_copies_of_the_parts_are_identical():
    copies = (cpus, convoy.training.cpus, convoy.client.cpus)
    assert len({inspect.getsource(copy) for copy in copies}) == 1


@pytest.mark.slow
def test_training_gives_torch_no_more_threads(tmp_path):
    """What bounds it is the affinity, which a test may set."""
    code = (
        "import os, torch\n"
        "from convoy.training import run\n"
        "torch.set_num_threads(8)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "run._bound_threads()\n"
        "print(torch.get_num_threads())\n"
    )
    environment = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert shown.stdout == "1\n"
