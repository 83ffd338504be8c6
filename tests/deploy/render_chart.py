"""Lints and renders the Helm chart for each set of values; `make chart` runs it.

It uses the program helm, or else the package helm-python-sdk of the interpreter that runs it. Each
rendering starts with the digest of the chart and the values, so that tests without either notice a
chart that was not rendered again. It has neither the rules nor the dashboard, whose files change
often: --show FILE prints the rendering of further values.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm"
CASES = Path(__file__).parent / "chart"
NAMESPACE = "models"


def cases() -> list[Path]:
    """The files of values."""
    return sorted(CASES.glob("*.values.yaml"))


def digest(values: Path) -> str:
    """The digest of what a rendering is made from."""
    files = sorted(path for path in CHART.rglob("*") if path.is_file() and not path.is_symlink())
    content = b"".join(path.read_bytes() for path in [*files, values])
    return hashlib.sha256(content).hexdigest()


def rendering_of(values: Path) -> Path:
    """The file with the rendering."""
    return values.with_name(values.name.replace(".values.", ".rendered."))


def render(values: Path) -> str:
    """The rendering, after a lint without warnings."""
    text = _by_program(values) if shutil.which("helm") else _by_package(values)
    documents = sorted(each.strip() for each in text.split("\n---\n") if _is_resource(each))
    header = f"# By `make chart` from deploy/helm; SHA-256 of chart and values {digest(values)}\n"
    return header + "".join(f"---\n{_without_source(each)}\n" for each in documents)


def _is_resource(document: str) -> bool:
    return "\nkind: " in f"\n{document}"


def _without_source(document: str) -> str:
    lines = document.removeprefix("---\n").splitlines()
    return "\n".join(line.rstrip() for line in lines if not line.startswith("# Source: "))


def _by_program(values: Path) -> str:
    chart = [str(CHART), "--values", str(values), "--namespace", NAMESPACE]
    _run("helm", "lint", "--strict", *chart)
    return _run("helm", "template", "convoy", *chart)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _by_package(values: Path) -> str:
    from helm_python import Chart, lint, values_from_yaml

    given = values_from_yaml(values.read_text())
    found = lint(CHART, given, strict=True, namespace=NAMESPACE)
    # Severity 2 is a warning; 1 recommends an icon.
    problems = [each for each in found["messages"] if each["severity"] > 1]
    if problems or found["errors"]:
        raise SystemExit(f"{values.name}: {json.dumps([problems, found['errors']], indent=2)}")
    with Chart.load(CHART) as chart:
        chart.validate_schema(given)
        rendered = chart.render(given, name="convoy", namespace=NAMESPACE)
    return "\n---\n".join(text for name, text in rendered.items() if name.endswith(".yaml"))


def main() -> None:
    """Write the renderings, compare them with --check, or print another with --show FILE."""
    if "--show" in sys.argv:
        print(render(Path(sys.argv[-1])))
        return
    for values in cases():
        text, path = render(values), rendering_of(values)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name}: differs from the chart; run `make chart`")


if __name__ == "__main__":
    main()
