import subprocess
import sys

import pytest

from tests.server.conftest import publish_version

# It was 287 before the request path was shortened.
MOST_CALLS = 150


@pytest.mark.parametrize("deadline", [[], ["--deadline-s", "60"]], ids=["no deadline", "deadline"])
def test_a_unary_model_infer_takes_few_python_calls(tmp_path, deadline):
    publish_version(tmp_path / "models" / "colors" / "1")
    command = [sys.executable, "-m", "benchmarks.count_calls", str(tmp_path / "models")]
    ports = ["--port", "0", "--metrics-port", "0"]
    ended = subprocess.run(
        [*command, *ports, *deadline], capture_output=True, text=True, timeout=120, check=True
    )
    *functions, total = ended.stdout.splitlines()
    calls = int(total.split()[0])
    assert any("DynamicBatcher.infer" in line for line in functions)
    assert any("Worker.run" in line for line in functions)
    assert calls < MOST_CALLS, ended.stdout
