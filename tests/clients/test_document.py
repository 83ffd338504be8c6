"""Every block of docs/clients.md is run as it stands, against a real server process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "clients.md"
NODE_PACKAGES = ("@grpc/grpc-js@1", "@grpc/proto-loader@0.8")


@pytest.fixture(scope="module")
def expected(repository):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return samples["images"][7], str(samples["logits"][7].argmax())


@pytest.fixture
def folder(expected, tmp_path):
    """The folder that the blocks run in: an image and the contracts."""
    Image.fromarray(expected[0]).save(tmp_path / "seven.png")
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    return tmp_path


def block(language, server):
    """The only block of a language, with the server's address in place of the document's."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.S | re.M)
    assert "127.0.0.1:8001" in text
    return text.replace("127.0.0.1:8001", server.address)


def run(command, folder, **environment):
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python(server, folder, expected):
    printed = run([sys.executable, "-c", block("python", server)], folder).splitlines()
    label = expected[1]
    assert printed[0].split()[0] == printed[1] == label
    assert "expected a JPEG" in printed[2]
    assert printed[3:] == ["(2, 10)", "Health(live=True, ready=True) ['digits']"]


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_node(server, folder, expected):
    try:
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--silent", *NODE_PACKAGES],
            cwd=folder,
            capture_output=True,
            timeout=100,
            check=True,
        )
    except subprocess.SubprocessError as error:
        pytest.skip(f"npm cannot install @grpc/grpc-js here: {error}")
    printed = run(["node", "-e", block("javascript", server)], folder).splitlines()
    assert sorted(line.split()[0] for line in printed) == sorted([expected[1], "1"])
    assert "1 10" in printed


@pytest.mark.skipif(
    not shutil.which("grpcurl"), reason="grpcurl is not installed: see docs/clients.md"
)
def test_grpcurl(server, folder, expected):
    printed = run(["bash", "-ec", block("sh", server)], folder)
    assert "inference.GRPCInferenceService\n" in printed
    assert '"status": "SERVING"' in printed
    assert re.search(r'"label": "(.*)"', printed)[1] == expected[1]
    assert '"datatype": "UINT8"' in printed
