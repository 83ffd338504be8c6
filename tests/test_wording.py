"""One term for one thing: replaced terms must not appear in code and prose."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = {".py", ".md", ".ipynb", ".proto", ".toml", ".yml", ".yaml", ".js", ".mjs", ".html", ".sh"}
GENERATED = ("proto/gen/", "requirements", "build/", "node_modules/")

# Replaced by endpoint, registry, version switch, rejection, mirror, mean and tail, throughput,
# chunk or slice, edge case, and for the other words by the right term in each place.
REPLACED = frozenset(
    {
        *("face", "faces", "catalog", "rollout", "rollouts", "tap", "taps"),
        *("refuse", "refused", "refuses", "refusing", "refusal", "refusals"),
        *("surely", "pace", "piece", "pieces", "hostile", "told", "stood", "artefact", "artefacts"),
    }
)
PHRASES = re.compile(
    r"\b((?:go|goes|went|going|gone) on|(?:serve|serves) on|(?:let|lets|letting) go)\b"
)
# A word of the field, or of a contract that only grows.
ALLOWED = re.compile(
    r"REFUSED_STREAM|[Cc]onnections? (?:is |are |was )?refused|ConnectionRefused\w*|ECONNREFUSED"
    r"|[Hh]ugging[ _-]?[Ff]ace|HUGGING_FACE|GRINNING FACE|font-face|collect_usage_pieces"
    r"|(?<=pb\.)Artefact|ARTEFACT_FORMAT_\w+"
    r"|(?:manifest|message|m)\.artefacts|\[\"artefacts\"\]|\"artefacts\":|artefacts=(?=\[|m\[|art)"
    r"|serving on|version refused|convoy_version_refusals_total|ConvoyRefusals|convoy_refusals:"
    r"|code=\"refused\""
)
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def sources() -> Iterator[Path]:
    """Every file of the project that people read."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXT and not name.startswith(GENERATED) and path.is_file():
            yield path


def replaced_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield each replaced word or phrase with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        rest = ALLOWED.sub(" ", line)
        yield from ((number, word) for word in WORD.findall(rest) if word.lower() in REPLACED)
        yield from ((number, phrase) for phrase in PHRASES.findall(rest))


@pytest.mark.skipif(
    not ((ROOT / ".git").exists() and shutil.which("git")), reason="needs a git checkout"
)
def test_replaced_words_stay_out():
    contract = ROOT / "proto" / "convoy" / "v1" / "model_manifest.proto"
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in sources()
        if path not in (Path(__file__), contract)
        for number, word in replaced_words(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_a_replaced_word_is_found_in_names_and_prose():
    text = "def is_refused():\n    pass  # it goes on\nclass RestFace: ...\nREFUSED_STREAM"
    assert list(replaced_words(text)) == [(1, "refused"), (2, "goes on"), (3, "Face")]
