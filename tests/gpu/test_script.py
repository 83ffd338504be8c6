"""The script for the GPU runs to its end on a CPU: a GPU's time is not for mending it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run.sh"
STEPS = {
    "versions": "txt",
    "train": "txt",
    "export": "txt",
    "device-time": "txt",
    "device-time-tf32": "txt",
    "device-time-graphs": "txt",
    "closed": "png",
    "closed-one-instance": "png",
    "closed-graphs": "png",
    "closed-front-ends-2": "png",
    "open": "png",
    "compare": "txt",
    "photographs": "txt",
    "export-large": "txt",
    "device-time-large": "txt",
    "closed-large-onnx": "png",
    "closed-large-torchscript": "png",
    "batch": "txt",
    "airbench": "txt",
}


@pytest.mark.timeout(900)
def test_every_step_of_the_script_but_these_tests_ends_well(device, tmp_path):
    if device != "cpu":
        pytest.skip("on CUDA the script itself is what runs")
    environment = os.environ | {"STEPS": " ".join(STEPS), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.endswith("== failed: none\n")
    for step, suffix in STEPS.items():
        assert (tmp_path / f"{step}.{suffix}").stat().st_size > 0 or step == "photographs"
