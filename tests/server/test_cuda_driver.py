"""Real runtimes with a driver that they cannot use: a compiled one, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from convoy.server.backends.device import count_cuda_devices
from tests.fake_cuda import driver_environment, needs_compiler
from tests.processes import run_module, running_server

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device"),
]

# The driver of the 550 series; today's runtimes are built for CUDA 13.
OLD = {"devices": 2, "version": 12040}
TOO_OLD = {
    "onnx": "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
    "torchscript": "The NVIDIA driver on your system is too old",
    "openvino": "openvino runs on the CPU only",
}
ASK = """
from convoy.server.backends.base import why_unusable
from convoy.server.backends.device import Device, Runtime, cuda_uuids, driver_version
print(driver_version(), *cuda_uuids())
for runtime in (Runtime.ONNX_RUNTIME, Runtime.TORCHSCRIPT, Runtime.OPENVINO):
    print(why_unusable(runtime, Device("cuda")))
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(**settings: int) -> None:
        folder = tmp_path / "driver"
        folder.mkdir()
        for name, value in driver_environment(folder, **settings).items():
            monkeypatch.setenv(name, value)

    return install


def test_each_runtime_says_why_it_cannot_use_the_driver(driver):
    driver(**OLD)
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    found, *reasons = done.stdout.splitlines()
    uuids = [f"GPU-00000000-0000-0000-0000-00000000000{number}" for number in (0, 1)]
    assert found.split() == ["12.4", *uuids]
    for reason, expected in zip(reasons, TOO_OLD.values(), strict=True):
        assert expected in reason
    assert reasons[0].endswith("(built for CUDA 13.0)")


def test_auto_runs_on_the_cpu_and_says_so(publish, driver):
    driver(**OLD)
    with running_server(publish().parent.parent, "--device", "auto") as server:
        (warning,) = [event for event in server.events if event["level"] == "warning"]
        assert warning["event"] == "running on the CPU: the runtime cannot use the CUDA device"
        assert warning["driver_supports"] == "CUDA 12.4"
        assert TOO_OLD["onnx"] in str(warning["reason"])
        assert server.wait_for("serving")["device"] == "cpu"
        # The management library works all the same; its last device is a slice, which tells less.
        for device in ("cuda:0", "cuda:1"):
            assert server.metric("convoy_device_memory_bytes", device=device) == 7
        assert server.metric("convoy_device_utilization_ratio", device="cuda:0") == 0.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            OLD,
            "--device cuda: onnx cannot use cuda:0, whose driver supports CUDA 12.4: "
            + TOO_OLD["onnx"],
        ),
        ({"init": 803}, "device 'cuda': the driver offers 0 CUDA devices (cuInit returned 803)"),
    ],
)
def test_cuda_ends_the_start_with_one_line(publish, driver, settings, message):
    driver(**settings)
    models = publish().parent.parent
    done = run_module("convoy.server", "--repository", models, "--device", "cuda", "--port", 0)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("convoy-server: ")


def test_auto_says_that_a_driver_does_not_work(publish, driver):
    driver(init=803)
    with running_server(publish().parent.parent, "--device", "auto") as server:
        warning = server.wait_for("running on the CPU: the CUDA driver does not work")
        assert warning["reason"] == "cuInit returned 803"
