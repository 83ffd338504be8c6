"""What Dockerfile, compose files and .env.example promise, read without an engine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from convoy.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
# Services that end.
ONCE = {"trainer", "predictions-folder", "batch"}
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def test_the_example_settings_are_the_defaults():
    files = ("docker-compose.yml", "docker-compose.secure.yml", "docker-compose.s3.yml")
    defaults = dict(VARIABLE.findall("".join((ROOT / name).read_text() for name in files)))
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example == {name: value for name, value in defaults.items() if name in example}
    assert defaults.keys() - example.keys() == {"CONVOY_REVISION"}


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_by_default(name):
    for port in SERVICES[name].get("ports", ()):
        assert VARIABLE.sub(r"\2", port).startswith("127.0.0.1:")


def test_who_opens_the_port_for_callers_opens_no_other():
    published = {port for name in SERVICES for port in SERVICES[name].get("ports", ())}
    assert {port for port in published if "${CONVOY_BIND:-" in port} == {
        "${CONVOY_BIND:-127.0.0.1}:${CONVOY_PORT:-8001}:8001"
    }


def test_grafana_has_no_default_password_and_a_health_check():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not any("PASSWORD" in key for key in environment)
    assert SERVICES["grafana"]["healthcheck"]["test"][-1].endswith("/api/health")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_limits_and_a_restart_policy(name):
    service = SERVICES[name]
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


def test_docker_waits_longer_than_the_server_drains():
    drain_s = ServerSettings.model_fields["drain_timeout_s"].default
    grace = SERVICES["server"]["stop_grace_period"]
    assert grace.endswith("s")
    assert int(grace.removesuffix("s")) >= drain_s + 5


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("docker-compose*.yml")))
def test_compose_1_29_understands_the_file(name):
    assert yaml.safe_load((ROOT / name).read_text()).keys() <= {
        "secrets",
        "x-restricted",
        "services",
        "volumes",
    }


def test_the_gpu_file_reserves_a_device_and_forbids_the_fall_back():
    services = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    for name in ("trainer", "server"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
    assert services["server"]["environment"]["CONVOY_DEVICE"] == "cuda"


def test_the_dockerfile_needs_no_buildkit():
    assert not re.search(r"^# *syntax|--mount|--link|--chmod|<<", DOCKERFILE, re.MULTILINE)


def test_the_images_are_built_with_the_makefiles_uv():
    makefile = re.search(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"ARG UV_VERSION={makefile[1]}\n" in DOCKERFILE


def test_the_container_images_have_the_projects_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"^ARG VERSION=(\S+)", DOCKERFILE, re.MULTILINE)) == {version}


def test_every_installation_is_bound_to_a_hashed_lock():
    commands = re.findall(r"^RUN uv pip install (?:.*\\\n)*.*", DOCKERFILE, re.MULTILINE)
    assert commands
    for command in commands:
        assert "--constraint requirements.lock" in command or "--no-deps" in command
    for lock in ("requirements.lock", "requirements-cpu.lock"):
        text = (ROOT / lock).read_text()
        assert text.count("==") <= text.count("--hash=sha256:")
        assert "://" not in text, "a lock names no registry"


def test_the_locks_agree_on_what_both_hold():
    def versions(lock: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, version in re.findall(r"^(\S+?)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE):
            found.setdefault(name, set()).add(version)
        return found

    whole, cpu = versions("requirements.lock"), versions("requirements-cpu.lock")
    assert {name: cpu[name] for name in cpu.keys() & whole.keys()} == {
        name: whole[name] for name in cpu.keys() & whole.keys()
    }
    assert cpu.keys() - whole.keys() == {"onnxruntime"}


def test_the_images_install_the_projects_dependencies_and_no_other_table():
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "only-dependencies.py", ROOT / "pyproject.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    whole, part = tomllib.loads((ROOT / "pyproject.toml").read_text()), tomllib.loads(done.stdout)
    assert part.keys() == {"project"}
    for key, value in part["project"].items():
        assert value == whole["project"][key]
    assert {"dependencies", "optional-dependencies"} <= part["project"].keys()
