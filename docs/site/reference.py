"""Generate the reference pages from the code: commands, settings, metrics, protocols, Python.

This module needs none of the site's packages, so the ordinary tests check the pages' content.
"""

import ast
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

ROOT = Path(__file__).parents[2]
OPENAPI = ROOT / "server" / "convoy" / "server" / "rest" / "page" / "openapi.json"
PACKAGES = {
    "convoy.client": "The client library. `pip install convoy-serving` installs it.",
    "convoy.export": "Publish a net from Python.",
    "convoy.training.nets": "Nets by name.",
    "convoy.training.data": "Data sets by specification.",
    "convoy.training.checkpoints": "Checkpoints of `convoy-train`.",
    "convoy.training.filters": "The lecture's fixed filters.",
}
PROTOCOLS = {
    "convoy/v1/classifier.proto": "convoy.v1.ClassifierService",
    "convoy/oip/v2/inference.proto": "Open Inference Protocol v2",
    "convoy/oip/v2/model_config.proto": "Model configuration",
}
MANIFEST = "convoy/v1/model_manifest.proto"
_METRIC_KINDS = ("counter", "gauge", "histogram", "info")


@dataclass(frozen=True)
class Metric:
    """A metric as the server defines it.

    Attributes:
        name: As /metrics shows it, with the suffix _total of a counter or _info.
        kind: counter, gauge, histogram or info.
        help: The sentence that describes it.
        labels: The names of its labels.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]


def server_page() -> str:
    """Describe `convoy-server` and its settings, group by group."""
    settings = importlib.import_module("convoy.server.settings")
    lines = ["# convoy-server", "", _paragraph(settings.ServerSettings.__doc__)]
    lines += ["", "`--help` prints this list, `--version` the version."]
    for title, group in settings.GROUPS.items():
        lines += ["", f"## {title.capitalize()}", "", group.__doc__, ""]
        lines += ["| flag | environment variable | default | description |", "|---|---|---|---|"]
        for name, field in group.model_fields.items():
            default = "required" if field.is_required() else _shown(field.default)
            flag = f"`--{name.replace('_', '-')}`"
            if isinstance(field.default, bool):
                flag += f", `--no-{name.replace('_', '-')}`"
            row = (flag, f"`CONVOY_{name.upper()}`", default, field.description)
            lines.append(f"| {' | '.join(_cell(value) for value in row)} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Describe the commands that have subcommands, as their `--help` does."""
    lines = ["# Commands", "", "[`convoy-server`](server.md) has a page of its own.", ""]
    for name, module in (
        ("convoy-train", "convoy.training.__main__"),
        ("convoy-export", "convoy.export.cli"),
        ("convoy-client", "convoy.client.cli"),
    ):
        command = typer.main.get_command(importlib.import_module(module).app)
        lines += [f"## {name}", "", _paragraph(command.help), ""]
        context = command.make_context(name, [], resilient_parsing=True)
        lines += _options(command, context)
        for each in command.list_commands(context):
            lines += _subcommand(command.get_command(context, each), f"{name} {each}", context)
    return "\n".join(lines) + "\n"


def _subcommand(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = type(parent)(command, info_name=name, resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f"### {name}", "", _paragraph(command.help), "", f"    {name} {usage}", "")
    yield from _options(command, context)


def _options(command: Any, context: Any) -> Iterator[str]:
    records = [each.get_help_record(context) for each in command.get_params(context)]
    rows = [record for record in records if record and record[0] != "--help"]
    if rows:
        yield from ("| option | description |", "|---|---|")
        yield from (f"| `{_cell(name)}` | {_cell(text)} |" for name, text in rows)
        yield ""


def metrics() -> list[Metric]:
    """Return every metric that the server's code defines, sorted by name."""
    found = {}
    for path in sorted((ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (metric := _metric(node)):
                found[metric.name] = metric
    return [found[name] for name in sorted(found)]


def _metric(call: ast.Call) -> Metric | None:
    function = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    kind = function.lower().removesuffix("metricfamily")
    texts = [_constant(each) for each in call.args[:2]]
    if kind not in _METRIC_KINDS or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
        return None
    name, text = str(texts[0]), str(texts[1])
    listed = next((k.value for k in call.keywords if k.arg in ("labels", "labelnames")), None)
    candidates = [listed] if listed is not None else call.args[2:]
    labels = next((found for each in candidates if (found := _names(each))), ())
    if isinstance(call.func, ast.Attribute):
        labels = ("model", "version", *labels)
    if not name.startswith("convoy_"):
        return None
    suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
    return Metric(f"{name.removesuffix('_total')}{suffix}", kind, text, labels)


def _names(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Name) and node.id == "labels":
        return ("model", "version")
    if not isinstance(node, ast.List | ast.Tuple):
        return ()
    values = [_constant(each) for each in node.elts]
    return tuple(each for each in values if isinstance(each, str))


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def metrics_page() -> str:
    """List the metrics that `/metrics` shows."""
    lines = [
        "# Metrics",
        "",
        "`--metrics-port` serves `/metrics` in Prometheus's text format. Durations are in seconds.",
        "[Operations](../operations.md) describes the alerts.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for each in metrics():
        labels = ", ".join(f"`{label}`" for label in each.labels) or "none"
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {_cell(each.help)} |")
    return "\n".join(lines) + "\n"


def rest_page() -> str:
    """Describe the REST paths from the OpenAPI document."""
    document = json.loads(OPENAPI.read_text())
    lines = [
        "# REST",
        "",
        _paragraph(document["info"]["description"]),
        "",
        "[openapi.json](../openapi.json) is the OpenAPI document of these paths. A server sends it",
        "as `/openapi.json` and shows it as `/docs`.",
    ]
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            lines += ["", f"## {verb.upper()} {path}", "", operation["summary"], ""]
            lines += ["| status | reply |", "|---|---|"]
            lines += [
                f"| {status} | {_cell(_resolve(document, reply)['description'])} |"
                for status, reply in operation["responses"].items()
            ]
    return "\n".join(lines) + "\n"


def _resolve(document: dict, value: dict) -> dict:
    while "$ref" in value:
        target = value["$ref"].removeprefix("#/").split("/")
        value = document
        for key in target:
            value = value[key]
    return value


def protocols_page() -> str:
    """Show the services and messages of gRPC, with their comments."""
    lines = ["# gRPC", "", "The server also answers `grpc.health.v1` and reflection."]
    for path, title in PROTOCOLS.items():
        lines += ["", f"## {title}", "", *_proto(path)]
    return "\n".join(lines) + "\n"


def manifest_page() -> str:
    """Show the messages of manifest.json and policy.json."""
    intro = "`manifest.json` and `policy.json` in a model repository are these messages as JSON."
    return "\n".join(["# Manifest", "", intro, "", *_proto(MANIFEST)]) + "\n"


def _proto(path: str) -> list[str]:
    return [f"`{path}`:", "", "```protobuf", (ROOT / "proto" / path).read_text().strip(), "```"]


def python_page() -> str:
    """Return the directives that mkdocstrings replaces with docstrings."""
    lines = ["# Python"]
    for name, text in PACKAGES.items():
        lines += ["", f"## {name}", "", text, ""]
        members = _public(name)
        lines += [line for member in members for line in (f"::: {member}", "")]
    return "\n".join(lines) + "\n"


def _public(package: str) -> list[str]:
    """Return the paths of the public classes and functions of a package, where they are defined."""
    module = importlib.import_module(package)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == package]
    names = getattr(module, "__all__", None) or [n for n in own if not n.startswith("_")]
    if package == "convoy.export":
        names = ["publish"]
    found = [getattr(module, name) for name in names]
    return [
        f"{each.__module__}.{each.__qualname__}" for each in found if hasattr(each, "__qualname__")
    ]


def _shown(default: object) -> str:
    if default is None or default == "":
        return "unset"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _paragraph(text: str | None) -> str:
    return re.sub(r"[ \t]*\n[ \t]*", "\n", (text or "").strip())


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    "reference/server.md": server_page,
    "reference/commands.md": commands_page,
    "reference/metrics.md": metrics_page,
    "reference/rest.md": rest_page,
    "reference/protocols.md": protocols_page,
    "reference/manifest.md": manifest_page,
    "reference/python.md": python_page,
}
"""The functions that return the Markdown of each page, by its path in the site."""
