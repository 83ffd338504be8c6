"""The Kubernetes manifests against the published schemas, and what must agree between them."""

import json
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from convoy.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
FOLDERS = (KUBERNETES / "base", KUBERNETES / "kserve")


def kustomization(folder: Path) -> dict:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def resources(folder: Path) -> dict[str, dict]:
    """The resources that a kustomization lists, by kind."""
    documents = [
        document
        for name in kustomization(folder)["resources"]
        for document in yaml.safe_load_all((folder / name).read_text())
    ]
    return {document["kind"]: document for document in documents}


BASE, KSERVE = map(resources, FOLDERS)
ALL = {**KSERVE, **BASE}


def closed(schema: object) -> object:
    """A custom resource's schema, rejecting unknown fields as the API server does when asked to."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    described = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if described and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def validate(resource: dict) -> None:
    path = SCHEMAS / f"{resource['kind'].lower()}.json"
    if path.exists():
        schema = closed(json.loads(path.read_text()))
        jsonschema.Draft202012Validator(schema).validate(resource)
    else:
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize(
    "resource",
    [pytest.param(each, id=each["kind"]) for each in (*BASE.values(), *KSERVE.values())],
)
def test_a_manifest_satisfies_its_published_schema(resource):
    validate(resource)


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Deployment", ("spec", "template", "spec", "terminationGracePeriod"), 45),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), "many"),
        ("ServiceMonitor", ("spec", "endpoint"), []),
        ("PodMonitor", ("spec", "podMetricsEndpoints"), "metrics"),
        ("ServingRuntime", ("spec", "protocolVersions"), "grpc-v2"),
        ("InferenceService", ("spec", "predictor", "model", "uri"), "pvc://models"),
    ],
)
def test_the_schemas_notice_a_mistake(kind, path, wrong):
    resource = json.loads(json.dumps(ALL[kind]))
    node = resource
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = wrong
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(resource)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_of_a_folder_is_in_its_kustomization(folder):
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization(folder)["resources"]) == files


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_renders_every_resource(folder):
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=True
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {resource["kind"] for resource in rendered} == resources(folder).keys()
    assert "image: convoy-server:local" in done.stdout


def pod() -> dict:
    return ALL["Deployment"]["spec"]["template"]["spec"]


def containers() -> list[dict]:
    return [pod()["containers"][0], ALL["ServingRuntime"]["spec"]["containers"][0]]


GRACE_PERIODS_S = [
    pod()["terminationGracePeriodSeconds"],
    ALL["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"],
]


@pytest.mark.parametrize(
    ("container", "grace_period_s"),
    list(zip(containers(), GRACE_PERIODS_S, strict=True)),
    ids=["Deployment", "KServe"],
)
def test_the_grace_period_covers_pre_stop_and_drain(container, grace_period_s):
    (drain,) = (arg for arg in container["args"] if arg.startswith("--drain-timeout-s="))
    command, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert grace_period_s >= int(pause_s) + float(drain.partition("=")[2]) + 5


@pytest.mark.parametrize("container", containers(), ids=["Deployment", "KServe"])
def test_containers_have_no_root_rights(container):
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context.get("runAsNonRoot") or pod()["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("container", containers(), ids=["Deployment", "KServe"])
def test_flags_and_variables_are_settings_of_the_server(container):
    flags = [flag.partition("=")[0].removeprefix("--") for flag in container["args"]]
    variables = [variable["name"].removeprefix("CONVOY_") for variable in container.get("env", ())]
    names = {name.replace("-", "_").lower() for name in (*flags, *variables)}
    assert names <= ServerSettings.model_fields.keys()


def test_the_services_name_does_not_become_a_setting():
    service = ALL["Service"]["metadata"]["name"]
    assert f"{service}_port".removeprefix("convoy_") in ServerSettings.model_fields
    assert pod()["enableServiceLinks"] is False


def test_everything_selects_the_pods_of_the_deployment():
    labels = ALL["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert ALL["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        assert ALL[kind]["spec"]["selector"]["matchLabels"] == labels
    assert ALL["Service"]["metadata"]["labels"] == labels, "the ServiceMonitor looks for them"


def test_named_ports_exist():
    ports = {port["name"]: port["containerPort"] for port in pod()["containers"][0]["ports"]}
    fields = ServerSettings.model_fields
    assert ports == {"grpc": fields["port"].default, "metrics": fields["metrics_port"].default}
    assert {port["targetPort"] for port in ALL["Service"]["spec"]["ports"]} == ports.keys()
    assert ALL["Service"]["spec"]["clusterIP"] == "None"
    endpoints = ALL["ServiceMonitor"]["spec"]["endpoints"]
    service_ports = {port["name"] for port in ALL["Service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in endpoints} <= service_ports


def test_the_autoscaler_reads_what_the_adapter_offers():
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter-values.yaml").read_text())["rules"]
    offered = {rule["name"]["as"] for rule in rules["custom"]}
    metrics = ALL["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert {metric["pods"]["metric"]["name"] for metric in metrics} == offered
    assert offered == {"convoy_wait_seconds"}
    assert ALL["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"] == {
        "apiVersion": ALL["Deployment"]["apiVersion"],
        "kind": "Deployment",
        "name": ALL["Deployment"]["metadata"]["name"],
    }


def test_the_inference_service_asks_for_what_the_runtime_offers():
    model = ALL["InferenceService"]["spec"]["predictor"]["model"]
    runtime = ALL["ServingRuntime"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = {supported["name"] for supported in runtime["spec"]["supportedModelFormats"]}
    assert model["modelFormat"]["name"] in formats


def test_kserve_names_what_the_service_and_the_monitor_select():
    name = KSERVE["InferenceService"]["metadata"]["name"]
    # pkg/constants/constants.go of KServe: GetRawServiceLabel(PredictorServiceName(name)).
    assert KSERVE["Service"]["spec"]["selector"] == {"app": f"isvc.{name}-predictor"}
    assert KSERVE["Service"]["spec"]["clusterIP"] == "None"
    (container,) = KSERVE["ServingRuntime"]["spec"]["containers"]
    ports = [port["name"] for port in container["ports"]]
    # The first one is what KServe's own Service offers, as HTTP/2 by its name.
    assert ports == ["h2c", "metrics"]
    assert KSERVE["Service"]["spec"]["ports"][0]["targetPort"] == "h2c"
    (endpoint,) = KSERVE["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"


@pytest.mark.parametrize("container", containers(), ids=["Deployment", "KServe"])
def test_probes_leave_a_margin_and_wait_for_the_first_model(container):
    check_probes(container)


def check_probes(container: dict) -> None:
    start, ready, live = (
        container[f"{each}Probe"] for each in ("startup", "readiness", "liveness")
    )
    # A server without a model is live and not ready, so it is not restarted until it has one.
    assert start["httpGet"]["path"] == live["httpGet"]["path"] == "/healthz"
    assert ready["httpGet"]["path"] == "/readyz"
    for probe in (start, ready, live):
        assert probe["httpGet"]["port"] == "metrics"
        assert probe["timeoutSeconds"] >= 5
        assert probe["failureThreshold"] >= 2
    assert start["periodSeconds"] * start["failureThreshold"] >= 120
    assert live["periodSeconds"] * live["failureThreshold"] >= 60
    assert ready["periodSeconds"] * ready["failureThreshold"] <= 5
