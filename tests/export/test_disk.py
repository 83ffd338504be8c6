"""A full disk: one line, nothing half-written, and no abort of the process."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

# No file may grow beyond this: as a full disk, as far as one process can make one.
LIMIT_BYTES = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torchscript", "exported-program"])
def test_a_full_disk_is_one_line(form: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convoy.export", str(tiny_checkpoint), "--name", "digits"]
    done = subprocess.run(
        [*command, "--repository", "models", "--format", form],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES,) * 2),
    )
    complaints = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert done.returncode == 1, done.stderr
    assert len(complaints) == 1, done.stderr
    assert "File too large" in complaints[0]
    assert not (tmp_path / "models" / "digits").exists()
