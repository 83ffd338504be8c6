import subprocess
import sys

import pytest

from convoy.server import assembly as options
from convoy.server.backends.device import Device
from convoy.server.errors import StartupError
from convoy.server.settings import GROUPS, ServerSettings, parse_settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"CONVOY_{name.upper()}", raising=False)
    monkeypatch.delenv("CONVOY_CONFIG", raising=False)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(monkeypatch, tmp_path):
    config = tmp_path / "convoy.toml"
    config.write_text('repository = "file"\nport = 1\nmax_batch_size = 1\ninstances = 1\n')
    monkeypatch.setenv("CONVOY_CONFIG", str(config))
    monkeypatch.setenv("CONVOY_PORT", "2")
    monkeypatch.setenv("CONVOY_MAX_BATCH_SIZE", "2")
    settings = parse_settings(["--max-batch-size", "3"])
    assert (settings.max_batch_size, settings.port, settings.instances) == (3, 2, 1)
    assert settings.repository == "file"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--repository is required"),
        (["--repository", "x", "--port", "http"], "--port: .*got 'http'"),
        (["--repository", "x", "--port", "65536"], "--port: .*65535.*got '65536'"),
        (["--repository", "x", "--device", "gpu"], "--device: .*got 'gpu'"),
        (["--repository", "x", "--device", "cpu,cuda"], "--device: .*got 'cpu,cuda'"),
        (["--repository", "x", "--device", "cuda:all,cuda"], "--device: .*got 'cuda:all,cuda'"),
        (["--repository", "x", "--backend", "tensorrt"], "--backend|tensorrt"),
        (["--repository", "x", "--max-batch-size", "-1"], "--max-batch-size: .*got '-1'"),
        (["--repository", "x", "--warmup-s", "-1"], "--warmup-s: .*got '-1'"),
        (["--repository", "x", "--color", "red"], "--color red"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(flags, message):
    with pytest.raises(StartupError, match=message) as caught:
        parse_settings(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "device",
    ["auto", "cpu", "cpu,cpu", "cuda", "cuda:1", "cuda:0,cuda:1", "cuda,cuda:1", "cuda:all"],
)
def test_one_device_or_several_of_a_kind_can_be_named(device):
    assert parse_settings(["--repository", "x", "--device", device]).device == device


@pytest.mark.parametrize(("flags", "instances"), [([], 4), (["--instances", "3"], 6)])
def test_instances_are_those_of_each_device(monkeypatch, flags, instances):
    monkeypatch.setattr(options, "usable_cpus", lambda: 12)
    settings = parse_settings(["--repository", "x", *flags])
    cpus = (Device("cpu"), Device("cpu"))
    loading = options.load_options(settings, cpus)
    assert (loading.devices, loading.limits.instances) == (cpus, instances)
    assert loading.threads == 12 // instances


@pytest.mark.parametrize(
    ("flags", "instances"), [([], 2), (["--cuda-graphs"], 1), (["--instances", "3"], 3)]
)
def test_on_a_gpu_one_batchs_transfer_can_overlap_anothers_work(flags, instances):
    settings = parse_settings(["--repository", "x", *flags])
    gpus = (Device("cuda", 0), Device("cuda", 1))
    assert options.load_options(settings, gpus).limits.instances == instances * len(gpus)


@pytest.mark.parametrize("content", ["color = 'red'", "port = ", "port = 'http'"])
def test_a_mistake_in_the_file_is_one_line(monkeypatch, tmp_path, content):
    config = tmp_path / "convoy.toml"
    config.write_text(content)
    monkeypatch.setenv("CONVOY_CONFIG", str(config))
    with pytest.raises(StartupError) as caught:
        parse_settings(["--repository", "x"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("CONVOY_MAX_BATCHSIZE", "did you mean CONVOY_MAX_BATCH_SIZE?"),
        ("convoy_token_flie", "did you mean CONVOY_TOKEN_FILE?"),
        ("CONVOY_OTLP_ENDPIONT", "did you mean CONVOY_OTLP_ENDPOINT?"),
        ("CONVOY_XYZ", "see convoy-server --help"),
    ],
)
def test_a_misspelt_variable_is_rejected_with_the_nearest_name(monkeypatch, variable, advice):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(StartupError) as caught:
        parse_settings(["--repository", "x"])
    assert str(caught.value) == f"{variable}: no such setting; {advice}"


def test_a_misspelt_key_of_the_file_is_rejected_with_the_nearest_name(monkeypatch, tmp_path):
    (tmp_path / "convoy.toml").write_text("max_batchsize = 3")
    monkeypatch.setenv("CONVOY_CONFIG", str(tmp_path / "convoy.toml"))
    with pytest.raises(StartupError) as caught:
        parse_settings(["--repository", "x"])
    assert str(caught.value) == "--max-batchsize: no such setting; did you mean --max-batch-size?"


def test_variables_of_the_client_and_of_kubernetes_are_no_settings(monkeypatch):
    monkeypatch.setenv("CONVOY_ADDRESS", "127.0.0.1:8001")
    for name, value in {
        "CONVOY_TLS_SERVER_NAME": "convoy",
        "CONVOY_PREDICTOR_SERVICE_HOST": "10.0.0.1",
        "CONVOY_PREDICTOR_SERVICE_PORT_GRPC": "80",
        "CONVOY_PREDICTOR_PORT": "tcp://10.0.0.1:80",
        "CONVOY_PREDICTOR_PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert parse_settings(["--repository", "x"]).port == 8001


def test_a_missing_file_is_an_error(monkeypatch):
    monkeypatch.setenv("CONVOY_CONFIG", "nowhere.toml")
    with pytest.raises(StartupError, match=r"expected a TOML file, got 'nowhere\.toml'"):
        parse_settings(["--repository", "x"])


def test_every_setting_is_described_and_belongs_to_one_group_of_the_help():
    grouped = [name for group in GROUPS.values() for name in group.__annotations__]
    assert sorted(grouped) == sorted(ServerSettings.model_fields)
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name


def test_the_help_lists_the_groups_in_order():
    command = [sys.executable, "-m", "convoy.server", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    places = [shown.index(f"\n{title}:\n") for title in GROUPS]
    assert places == sorted(places)
    assert places[0] < shown.index("  --repository") < places[1]


@pytest.mark.parametrize(
    ("flag", "new"),
    [
        ("--max-queue-mb", "--max-queue-mib"),
        ("--lame-duck-seconds", "--lame-duck-s"),
        ("--http-port", "--metrics-port"),
    ],
)
def test_a_flag_of_an_earlier_version_names_the_new_one(flag, new):
    with pytest.raises(StartupError, match=f"^{flag}: removed; .*{new}"):
        parse_settings(["--repository", "x", flag, "1"])
