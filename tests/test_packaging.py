"""The wheel as users install it: one namespace, no collisions, types, clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
COMMANDS = ("convoy-train", "convoy-export", "convoy-server", "convoy-client")
PORTIONS = ("client", "export", "server", "training")


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, check=False, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what a bare installation brings, from the lock."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    made = run(BIN / "uv", "venv", "--quiet", "--python", sys.executable, folder)
    assert made.returncode == 0, made.stderr
    installed = run(
        BIN / "uv",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "requirements.lock",
        wheel,
        env={**os.environ, "VIRTUAL_ENV": str(folder), "UV_NO_CONFIG": "1"},
    )
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project whose packages bear the names of Convoy's folders."""
    for name in ("server", "clients", "training", "export", "proto"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'the user: {name}'\n")
    (tmp_path / "use.py").write_text(
        "import clients, export, server, training\n"
        "from convoy.client import Client\n"
        "print(clients.OWNER, server.OWNER, Client.__name__)\n"
    )
    return tmp_path


def test_the_wheel_puts_only_the_namespace_into_site_packages(environment, wheel):
    (site,) = (environment / "lib").glob("python*/site-packages")
    (record,) = site.glob("convoy_serving-*.dist-info/RECORD")
    tops = {line.split("/")[0] for line in record.read_text().splitlines()}
    assert tops == {"convoy", record.parent.name, ".."}  # `..` leads to bin/convoy-…
    assert not (site / "convoy" / "__init__.py").exists()
    for portion in PORTIONS:
        assert (site / "convoy" / portion / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("python_path", [None, "."])
def test_a_project_with_packages_of_the_same_names_uses_the_library(
    environment, project, python_path
):
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path:
        variables["PYTHONPATH"] = python_path
    for python in (sys.executable, environment / "bin" / "python"):
        used = run(python, "use.py", cwd=project, env=variables)
        assert used.stdout.startswith("the user: clients the user: server Client"), used.stderr
    for command in COMMANDS:
        helped = run(BIN / command, "--help", cwd=project, env=variables)
        assert (helped.returncode, "--help" in helped.stdout) == (0, True), helped.stderr


@pytest.mark.slow
def test_a_client_only_installation_names_the_missing_extra(environment, tmp_path):
    (tmp_path / "best.pt").touch()
    needs = {
        ("convoy-train", "--data", "digits"): "train",
        ("convoy-export", "best.pt", "--name", "digits"): "export,server",
        ("convoy-server", "--repository", "models"): "server",
    }
    for (command, *arguments), extra in needs.items():
        started = run(environment / "bin" / command, *arguments, cwd=tmp_path)
        assert started.returncode == 2
        (line,) = started.stderr.splitlines()
        assert line.startswith(f"{command}: needs ")
        assert f"convoy-serving[{extra}]" in line
    helped = run(environment / "bin" / "convoy-client", "--help")
    assert helped.returncode == 0, helped.stderr


@pytest.mark.slow
def test_mypy_finds_the_types_in_a_users_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from convoy.client import Client\n\n\n"
        "def best(path: str) -> str:\n"
        "    with Client('127.0.0.1:8001') as client:\n"
        "        answer = client.classify(path)\n"
        "    reveal_type(answer)\n"
        "    return answer.best.probability\n"
    )
    checked = run(BIN / "mypy", "--strict", "--cache-dir", tmp_path / "cache", script, cwd=tmp_path)
    assert 'Revealed type is "convoy.client.results.Classification"' in checked.stdout
    assert 'got "float", expected "str"' in checked.stdout
    assert "missing library stubs" not in checked.stdout
