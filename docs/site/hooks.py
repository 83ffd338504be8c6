"""Hooks of mkdocs: add the pages that are generated, and check that the site needs no network."""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import reference

_ROOT = reference.ROOT
# Files of the repository's root, as pages; the README is the home page.
_ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
}
_LINK = r"\[([^\]\[]*)\]\(%s\)"
_LOADED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages and the pages of the repository's root."""
    pages = {path: make() for path, make in reference.PAGES.items()}
    for name, page in _ROOT_PAGES.items():
        pages[page] = _moved((_ROOT / name).read_text())
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    openapi = reference.OPENAPI
    files.append(File.generated(config, openapi.name, content=openapi.read_text()))
    return files


def _moved(text: str) -> str:
    """Return the text of a page of the root with links that fit the site."""
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in _ROOT_PAGES.items():
        text = text.replace(f"]({name})", f"]({page})")
    links = re.compile(_LINK % r"((?!https?:|#)[\w./-]+)(?:#[\w-]+)?")
    return links.sub(lambda link: link[0] if _in_site(link[2]) else link[1], text)


def _in_site(path: str) -> bool:
    return path in _ROOT_PAGES.values() or (_ROOT / "docs" / path).is_file()


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links to files of the repository outside docs/ into plain text."""
    links = re.compile(_LINK % r"\.\./([\w./-]+)")
    return links.sub(lambda link: link[0] if link[2] == "openapi.json" else link[1], markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page loads anything from the network."""
    for page in Path(config.site_dir).rglob("*.html"):
        found = [url for url in _LOADED.findall(page.read_text()) if not _canonical(url, config)]
        if found:
            raise PluginError(f"{page}: loads {found[0]} from the network")


def _canonical(url: str, config: MkDocsConfig) -> bool:
    return bool(config.site_url) and url.startswith(config.site_url)
