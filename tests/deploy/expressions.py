"""Every PromQL expression of the stack, where it stands, and the metrics it needs."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
ADAPTER = ROOT / "deploy" / "kubernetes" / "prometheus-adapter-values.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "convoy.json"
RECORDED = re.compile(r"\b[a-z_]+:convoy_\w+:\w+")
METRIC = re.compile(r"(?<!:)\bconvoy_[a-z0-9_]+\b(?!:)")


@dataclass(frozen=True)
class Expression:
    """One expression.

    Attributes:
        place: Where it stands, for people.
        promql: With Grafana's variables filled in.
        unit: Grafana's name of the unit; "" outside panels.
    """

    place: str
    promql: str
    unit: str = ""

    @property
    def metrics(self) -> frozenset[str]:
        """The server's metrics that it reads, through recording rules as well."""
        recorded = {name: rule["expr"] for rule in rules("record") for name in [rule["record"]]}
        text, found = self.promql, set()
        while text:
            found |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRIC.findall(text)}
            text = " ".join(recorded[name] for name in RECORDED.findall(text))
        return frozenset(found)


@cache
def rules(kind: str) -> list[dict]:
    """All rules of a kind, "alert" or "record"."""
    return [
        rule
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


def dashboard() -> dict:
    """The Grafana dashboard."""
    return json.loads(DASHBOARD.read_text())


def panel_expressions() -> list[Expression]:
    """The queries of all panels and annotations, for all models and a scrape each second."""
    places = [
        (f"{panel['title']} {target['refId']}", target["expr"], panel_unit(panel))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ] + [
        (f"annotation {note['name']}", note["expr"], "")
        for note in dashboard()["annotations"]["list"]
    ]
    return [
        Expression(place, text.replace("$model", ".*").replace("$__rate_interval", "4s"), unit)
        for place, text, unit in places
    ]


def panel_unit(panel: dict) -> str:
    """The unit of a panel's values; heat maps count, whatever their axis shows."""
    if panel["type"] == "heatmap":
        return "none"
    return panel["fieldConfig"]["defaults"].get("unit", "")


def record_expressions() -> list[Expression]:
    """The series that recording rules write."""
    return [Expression(rule["record"], rule["record"]) for rule in rules("record")]


def alert_expressions() -> list[Expression]:
    """What alerts compare; empty while all is well."""
    return [Expression(rule["alert"], rule["expr"]) for rule in rules("alert")]


def autoscaler_expressions() -> list[Expression]:
    """What the autoscaler reads through prometheus-adapter; servers stand for pods."""
    found = []
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]:
        promql = rule["metricsQuery"].replace("<<.GroupBy>>", "instance")
        promql = promql.replace("<<.LabelMatchers>>", 'job="convoy"')
        found.append(Expression(f"autoscaler {rule['name']['as']}", promql, "s"))
    return found
