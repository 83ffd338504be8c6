"""The documentation: links have targets, and every flag and metric is documented and exists."""

import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from typer.testing import CliRunner

from convoy.server.settings import parse_settings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md")) + sorted(ROOT.glob("*.md"))
COMMANDS = {
    "convoy-train": "convoy.training.__main__",
    "convoy-export": "convoy.export.cli",
    "convoy-client": "convoy.client.cli",
}
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
METRIC = re.compile(r"\bconvoy_[a-z0-9_]+\b")
# Flags in the pages of other programs.
FOREIGN = frozenset(
    {
        *("--address", "--build", "--cpus", "--data-binary", "--file", "--gpus", "--kustomize"),
        *(
            "--capacity",
            "--nproc-per-node",
            "--profile",
            "--read-only",
            "--rm",
            "--tail",
            "--target",
            "--tmpfs",
        ),
        *("--build-arg", "--h1", "--loader", "--only-convoy", "--load", "--http", "--external"),
    }
)


def load_reference() -> ModuleType:
    path = ROOT / "docs" / "site" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_reference()


@cache
def generated() -> str:
    """The pages of commands, settings and metrics; that of Python would import torch."""
    reference = load_reference()
    return reference.server_page() + reference.commands_page() + reference.metrics_page()


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"`|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading)
    return re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    outside_code = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {slug(each) for each in re.findall(r"^#+ (.+)$", outside_code, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_a_heading_has_the_anchor_of_github():
    assert slug("Several GPUs or `hosts`, now") == "several-gpus-or-hosts-now"


def helps(name: str) -> list[str]:
    """What `--help` of a command and of its subcommands prints."""
    app = importlib.import_module(COMMANDS[name]).app
    subcommands = typer.main.get_command(app).commands
    runner = CliRunner(env={"COLUMNS": "500", "TERM": "dumb", "NO_COLOR": "1"})
    return [
        runner.invoke(app, [*words, "--help"], terminal_width=500).output
        for words in ([], *([each] for each in subcommands))
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_in_the_reference(name):
    found = {flag for text in helps(name) for flag in FLAG.findall(text)} - {"--help"}
    assert len(found) > 10
    assert not found - set(FLAG.findall(generated()))


def test_every_flag_of_the_server_is_in_the_reference(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    found = set(FLAG.findall(capsys.readouterr().out))
    assert len(found) > 40
    assert not found - set(FLAG.findall(generated()))


def test_every_metric_in_the_code_is_in_the_reference(reference):
    code = "\n".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    literals = set(re.findall(r'"(convoy_[a-z0-9_]+)"', code))
    listed = {metric.name for metric in reference.metrics()}
    assert len(listed) > 25
    assert not {name for name in literals if not {name, f"{name}_total", f"{name}_info"} & listed}


def test_every_metric_that_the_pages_name_exists(reference):
    listed = {metric.name for metric in reference.metrics()}
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {f"{name}{suffix}" for name in listed for suffix in suffixes}
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    rules = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    adapter = (ROOT / "deploy" / "kubernetes" / "prometheus-adapter-values.yaml").read_text()
    known |= set(re.findall(r"as: (\w+)", adapter))
    named = {name for page in pages for name in METRIC.findall(page.read_text())}
    recorded = {
        name for page in rules for name in re.findall(r"record: \w+:(\w+)", page.read_text())
    }
    assert not named - known - recorded


def test_every_flag_that_the_pages_name_exists():
    known = set(FLAG.findall(generated())) | FOREIGN
    for path in [
        ROOT / "Makefile",
        *(ROOT / "benchmarks").glob("*.py"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        known |= set(FLAG.findall(path.read_text()))
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    named = {(page.name, flag) for page in pages for flag in FLAG.findall(page.read_text())}
    assert not {(page, flag) for page, flag in named if flag not in known}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation + "\n", page.name
    for page in load_reference().PAGES:
        assert f": {page}\n" in navigation, page
