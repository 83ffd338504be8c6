"""Prometheus's configuration, rules and alerts, by promtool; and the runbook they point to."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.deploy.expressions import PROMETHEUS, ROOT, Expression, panel_expressions, rules
from tests.needs import needs_program

RULE_TESTS = Path(__file__).parent / "rules"
UNIT_TESTS = sorted(RULE_TESTS.glob("*.yml"))


@cache
def unit_tests() -> list[dict]:
    """The unit tests of all rules."""
    return [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]]


needs_promtool = needs_program("promtool", "prometheus")


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


@needs_promtool
def test_promtool_accepts_the_configuration():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@needs_promtool
def test_promtool_accepts_the_rules_without_a_lint_finding():
    promtool("check", "rules", "--lint=all", "--lint-fatal", *(PROMETHEUS / "rules").glob("*.yml"))


@needs_promtool
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_rules_give_what_their_unit_tests_expect(path):
    promtool("test", "rules", path)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_shown_to_fire_and_to_stay_silent(name):
    cases = [
        bool(case["exp_alerts"])
        for test in unit_tests()
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == name
    ]
    assert set(cases) == {True, False}


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: rule["record"])
def test_every_recording_rule_has_a_unit_test(rule):
    tested = " ".join(
        case["expr"] for test in unit_tests() for case in test.get("promql_expr_test", ())
    )
    for pattern in re.findall(r'__name__=~"([^"]+)"', tested):
        if re.fullmatch(pattern, rule["record"]):
            return
    assert rule["record"] in tested


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_leads_to_its_section_of_the_runbook(name):
    page, _, anchor = ALERTS[name]["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    assert anchor in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in headings}
    assert anchor == name.lower()
    section = re.search(rf"^#+ {name}\n(.+?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section
    assert len(section[1].split()) >= 20, "a heading alone helps nobody at night"


def device_queries() -> list[Expression]:
    """The queries of metrics that only a machine with a GPU has."""
    return [
        query
        for query in panel_expressions()
        if any(name.startswith("convoy_device_") for name in query.metrics)
    ]


@needs_promtool
@pytest.mark.parametrize("query", device_queries(), ids=lambda query: query.place)
def test_queries_about_gpus_answer(query, tmp_path):
    (metric,) = query.metrics
    series = f'{metric}{{device="cuda:0",instance="a"}}'
    unit_test = {
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": "0.5x5"}],
                "promql_expr_test": [
                    {
                        "expr": query.promql,
                        "eval_time": "5m",
                        "exp_samples": [{"labels": series, "value": 0.5}],
                    }
                ],
            }
        ]
    }
    path = tmp_path / "device.yml"
    path.write_text(yaml.safe_dump(unit_test))
    promtool("test", "rules", path)


def test_there_are_queries_about_gpus():
    assert len(device_queries()) >= 2
