"""The Helm chart: its renderings against the published schemas, and what must agree in them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from convoy.server.settings import ServerSettings
from tests.deploy import render_chart
from tests.deploy.test_kubernetes import ROOT, check_probes, validate
from tests.deploy.test_kubernetes import resources as kustomized

CASES = {path.name.partition(".")[0]: path for path in render_chart.cases()}
ENGINE = ROOT / "build" / "helm" / "bin" / "python"
VALUES = yaml.safe_load((render_chart.CHART / "values.yaml").read_text())
SCHEMA = json.loads((render_chart.CHART / "values.schema.json").read_text())

needs_helm = pytest.mark.skipif(
    not ENGINE.exists() and shutil.which("helm") is None,
    reason="needs helm, or its engine by `make chart`",
)


def rendered(case: str) -> dict[str, dict]:
    """The resources of a rendering, by kind."""
    documents = yaml.safe_load_all(render_chart.rendering_of(CASES[case]).read_text())
    return {document["kind"]: document for document in documents}


def pod(case: str) -> dict:
    return rendered(case)["Deployment"]["spec"]["template"]["spec"]


def helm(*arguments: object) -> subprocess.CompletedProcess:
    python = ENGINE if ENGINE.exists() else "python3"
    script = Path(render_chart.__file__)
    return subprocess.run(
        [python, script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("case", CASES)
def test_the_renderings_are_of_this_chart(case):
    header = render_chart.rendering_of(CASES[case]).read_text().splitlines()[0]
    assert render_chart.digest(CASES[case]) in header, "run `make chart`"


@needs_helm
def test_helm_lints_the_chart_and_renders_it_so():
    done = helm("--check")
    assert done.returncode == 0, done.stderr


@needs_helm
def test_helm_renders_rules_with_runbooks_and_the_dashboard(tmp_path):
    values = tmp_path / "monitoring.values.yaml"
    values.write_text(
        "monitoring: {prometheusRule: {enabled: true, runbookBase: 'https://runbooks/x'},"
        " dashboard: {enabled: true}}"
    )
    done = helm("--show", values)
    assert done.returncode == 0, done.stderr
    found = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    for kind in ("PrometheusRule", "ConfigMap"):
        validate(found[kind])
    sources = [
        yaml.safe_load((ROOT / f"deploy/prometheus/rules/{name}.yml").read_text())["groups"]
        for name in ("recording", "alerts")
    ]
    groups = found["PrometheusRule"]["spec"]["groups"]
    expected = json.loads(json.dumps([*sources[0], *sources[1]]))
    alerts = [rule for group in expected for rule in group["rules"] if "alert" in rule]
    for rule in alerts:
        section = rule["annotations"].pop("runbook").removeprefix("docs/operations.md")
        assert re.fullmatch(r"#\w+", section)
        rule["annotations"]["runbook_url"] = f"https://runbooks/x{section}"
    assert len(alerts) > 5
    assert groups == expected
    dashboard = (ROOT / "deploy/grafana/dashboards/convoy.json").read_text()
    assert found["ConfigMap"]["data"] == {"convoy.json": dashboard}


@needs_helm
def test_helm_rejects_values_outside_the_schema(tmp_path):
    values = tmp_path / "wrong.values.yaml"
    values.write_text("gpus: {enabled: true}")
    done = helm("--show", values)
    assert done.returncode != 0
    assert "gpus" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_rendering_satisfies_the_published_schemas(case):
    found = rendered(case)
    for resource in found.values():
        validate(resource)
    expected = {
        "defaults": {"PersistentVolumeClaim", "PodDisruptionBudget", "ServiceAccount"},
        "store": {"HorizontalPodAutoscaler", "Job", "NetworkPolicy", "PodDisruptionBudget"}
        | {"ServiceAccount", "ServiceMonitor"},
        "volume": {"Job", "NetworkPolicy"},
    }
    assert found.keys() == {"Deployment", "Service"} | expected[case]


def test_the_chart_and_the_kustomization_run_the_same_pod():
    kustomization = kustomized(ROOT / "deploy" / "kubernetes" / "base")
    base = kustomization["Deployment"]["spec"]["template"]["spec"]
    (ours,), (theirs,) = pod("defaults")["containers"], base["containers"]
    fields = ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "resources")
    for field in (*fields, "securityContext"):
        assert ours[field] == theirs[field], field
    for field in ("terminationGracePeriodSeconds", "securityContext", "enableServiceLinks"):
        assert pod("defaults")[field] == base[field], field
    autoscaler = rendered("store")["HorizontalPodAutoscaler"]["spec"]
    assert autoscaler == kustomization["HorizontalPodAutoscaler"]["spec"]


@pytest.mark.parametrize("case", CASES)
def test_flags_and_variables_are_settings_of_the_server(case):
    (container,) = pod(case)["containers"]
    names = [flag.partition("=")[0].removeprefix("--") for flag in container["args"]]
    names += [
        variable["name"].removeprefix("CONVOY_")
        for variable in container.get("env", ())
        if variable["name"].startswith("CONVOY_")
    ]
    assert {name.replace("-", "_").lower() for name in names} <= ServerSettings.model_fields.keys()


@pytest.mark.parametrize("case", CASES)
def test_shutdown_and_probes_are_consistent(case):
    (container,) = pod(case)["containers"]
    (drain,) = (arg for arg in container["args"] if arg.startswith("--drain-timeout-s="))
    command, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    grace_period_s = pod(case)["terminationGracePeriodSeconds"]
    assert grace_period_s >= int(pause_s) + float(drain.partition("=")[2]) + 5
    check_probes(container)


@pytest.mark.parametrize("case", CASES)
def test_everything_selects_the_pods(case):
    found = rendered(case)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = {
        "Deployment": ("selector", "matchLabels"),
        "Service": ("selector",),
        "PodDisruptionBudget": ("selector", "matchLabels"),
        "ServiceMonitor": ("selector", "matchLabels"),
        "NetworkPolicy": ("podSelector", "matchLabels"),
    }
    for kind in selectors.keys() & found.keys():
        selector = found[kind]["spec"]
        for key in selectors[kind]:
            selector = selector[key]
        assert selector
        assert selector.items() <= labels.items(), kind
    if job := found.get("Job"):
        selector = found["Service"]["spec"]["selector"]
        assert not selector.items() <= job["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("case", CASES)
def test_every_mount_has_its_volume(case):
    found = rendered(case)
    for kind in {"Deployment", "Job"} & found.keys():
        spec = found[kind]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in spec["volumes"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        for flag in container.get("args", ()):
            path = flag.partition("=")[2]
            if path.startswith("/"):
                assert any(path.startswith(folder) for folder in mounts.values()), flag


def test_a_store_needs_no_volume_and_the_cache_fits():
    spec = pod("store")
    assert not [volume for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    (container,) = spec["containers"]
    assert "--repository=s3://bucket/models" in container["args"]
    (limit,) = (arg for arg in container["args"] if arg.startswith("--cache-mib="))
    (cache,) = (volume for volume in spec["volumes"] if volume["name"] == "cache")
    assert int(cache["emptyDir"]["sizeLimit"].removesuffix("Mi")) > float(limit.partition("=")[2])


def test_every_value_is_in_the_schema():
    """Else Helm would reject a default, or accept a misspelt name."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft7Validator(SCHEMA)
    validator.validate(VALUES)
    for path in CASES.values():
        validator.validate(yaml.safe_load(path.read_text()))

    def check(values: dict, schema: dict, where: str) -> None:
        assert schema["properties"].keys() - {"global"} == values.keys(), where
        assert schema["additionalProperties"] is False, where
        for name, value in values.items():
            inner = schema["properties"][name]
            if isinstance(value, dict) and "properties" in inner:
                check(value, inner, f"{where}.{name}")

    check(VALUES, SCHEMA, "values")


@pytest.mark.parametrize(
    "wrong",
    [
        {"shutdown": {"margin": 1}},
        {"repository": {"url": "bucket/models"}},
        {"repository": {"volumeClaim": {"accessMode": "RWX"}}},
        {"image": {"digest": "latest"}},
        {"tls": {"secrets": "x"}},
        {"server": {"args": ["slo-ms=50"]}},
    ],
    ids=str,
)
def test_the_schema_rejects_a_mistake(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(wrong)
