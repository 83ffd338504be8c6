"""Rules for the whole project: imports, stubs, versions, and the files of the architecture page."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level modules of a fresh process after one statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stdout.split())


def test_importing_clients_loads_nothing_heavy():
    heavy = {
        "torch",
        "torchvision",
        "onnxruntime",
        "prometheus_client",
        "pyarrow",
        "matplotlib",
        "ray",
    }
    assert not modules_loaded_by("import convoy.client, convoy.client.__main__") & heavy


@pytest.mark.parametrize("part", ["convoy.server.app", "convoy.server.__main__"])
def test_importing_the_server_loads_no_runtime(part):
    assert not modules_loaded_by(f"import {part}") & {"torch", "onnxruntime"}


def test_the_stubs_are_what_the_sources_give():
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", "--check"], check=True)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("convoy-train", "convoy.training"),
        ("convoy-export", "convoy.export"),
        ("convoy-server", "convoy.server"),
        ("convoy-client", "convoy.client"),
    ],
)
def test_each_command_helps_by_both_names(name, module):
    for command in ([Path(sys.executable).parent / name], [sys.executable, "-m", module]):
        result = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "--help" in result.stdout


def test_the_floors_of_grpcio_and_protobuf_are_those_of_the_stubs():
    stubs = ROOT / "proto" / "gen" / "convoy" / "v1"
    grpc_floor = re.search(
        r"GRPC_GENERATED_VERSION = '([\d.]+)'", (stubs / "classifier_pb2_grpc.py").read_text()
    )
    protobuf_floor = re.search(
        r"Protobuf Python Version: (\d+\.\d+)", (stubs / "classifier_pb2.py").read_text()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"grpcio>={grpc_floor[1]}" in project["dependencies"]
    assert f"protobuf>={protobuf_floor[1]}" in project["dependencies"]


def test_the_files_named_by_the_architecture_page_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/.]+(?:\.py|\.proto|/))`", page))
    named |= set(re.findall(r"^ ?([a-z_]+(?:/|\.py))(?= )", page, re.M))
    assert len(named) > 30
    inside = ROOT / "server" / "convoy" / "server"
    assert not {name for name in named if not ((ROOT / name).exists() or (inside / name).exists())}


WATCH_IMPORT = """
import os, sys
def watch(event, arguments):
    if event == "import" and arguments[0] == "onnxruntime":
        print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "convoy.server.backends.onnx",
        "convoy.export.onnx_format",
        "convoy.export.onnx_import",
        "convoy.export.int8",
        "convoy.client.batch.runtime",
    ],
)
def test_telemetry_is_off_before_onnxruntime_is_imported(module):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORT_")}
    result = subprocess.run(
        [sys.executable, "-c", f"{WATCH_IMPORT}\nimport {module}"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert set(result.stdout.split()) == {"1"}
