import pytest

from server import options
from server.backends.devices import Device
from server.errors import StartupError
from server.settings import ServerSettings, parse_settings


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
    assert settings.repository.name == "file"


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
        (["--repository", "x", "--colour", "red"], "--colour red"),
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


@pytest.mark.parametrize("content", ["colour = 'red'", "port = ", "port = 'http'"])
def test_a_mistake_in_the_file_is_one_line(monkeypatch, tmp_path, content):
    config = tmp_path / "convoy.toml"
    config.write_text(content)
    monkeypatch.setenv("CONVOY_CONFIG", str(config))
    with pytest.raises(StartupError) as caught:
        parse_settings(["--repository", "x"])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(monkeypatch):
    monkeypatch.setenv("CONVOY_CONFIG", "nowhere.toml")
    with pytest.raises(StartupError, match=r"expected a TOML file, got 'nowhere\.toml'"):
        parse_settings(["--repository", "x"])


def test_every_setting_explains_itself():
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name
