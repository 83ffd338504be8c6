"""CUDA without a GPU: a driver that real runtimes load, and a double of ONNX Runtime's session.

`driver_environment` compiles the driver and NVIDIA's management library; a process started in that
environment finds the devices that the variables in driver.c describe. `runtime` has the double.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_LIBRARIES = {"driver.c": "libcuda.so.1", "nvml.c": "libnvidia-ml.so.1"}

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs cc (Debian package gcc)"
)


def driver_environment(folder: Path, **settings: int) -> dict[str, str]:
    """Compile the libraries into a folder; return the variables with which a process uses them."""
    for source, library in _LIBRARIES.items():
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o"]
        subprocess.run([*command, folder / library, _HERE / source], check=True)
    variables = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    return {"LD_LIBRARY_PATH": str(folder), **variables}
