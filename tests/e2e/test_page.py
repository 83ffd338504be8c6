"""The page in a real browser, against a real server."""

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

DROP = """([base64, name]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  const drop = document.getElementById("drop");
  drop.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
}"""
PASTE = DROP.replace(
    """const drop = document.getElementById("drop");
  drop.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));""",
    """document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));""",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    context = browser.new_context(color_scheme="light", viewport={"width": 1100, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.http)
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#model option")).to_have_text("digits, version 1")
    expect(page.locator("#token-field")).to_be_hidden()
    yield page
    context.close()
    assert problems == []


@pytest.fixture(scope="module")
def digits(repository) -> list[tuple[str, str]]:
    """PNG files, in base64, with the class that the net gives them."""
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as golden:
        offsets, encoded = golden["encoded_offsets"], golden["encoded"]
        best = golden["logits"].argmax(axis=1)
        return [
            (base64.b64encode(encoded[start:end].tobytes()).decode(), str(label))
            for start, end, label in zip(offsets[:-1], offsets[1:], best, strict=True)
        ]


def test_a_dropped_image_shows_its_class(page, digits, tmp_path_factory):
    for file, label in digits[:3]:
        page.evaluate(DROP, [file, f"digit-{label}.png"])
        expect(page.locator("#best")).to_have_text(label)
    bars = page.locator("#classes meter")
    expect(bars).to_have_count(5)
    values = [float(bars.nth(n).get_attribute("value")) for n in range(5)]
    assert values == sorted(values, reverse=True)
    assert 0 < sum(values) <= 1.001
    stages = page.locator("#stages").inner_text()
    assert re.search(r"decode\s+[0-9.]+ ms", stages)
    assert re.search(r"inference\s+[0-9.]+ ms", stages)
    # After some seconds the charts have something to show.
    expect(page.locator("#charts figure")).to_have_count(4, timeout=15_000)
    expect(page.locator("#charts path").first).to_have_attribute(
        "d", re.compile("M"), timeout=15_000
    )
    picture = tmp_path_factory.mktemp("page") / "page.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000


def test_an_image_can_be_pasted_or_chosen(page, digits, tmp_path):
    file, label = digits[3]
    page.evaluate(PASTE, [file, "clipboard.png"])
    expect(page.locator("#best")).to_have_text(label)
    file, label = digits[4]
    Path(tmp_path / "chosen.png").write_bytes(base64.b64decode(file))
    page.locator("#file").set_input_files(tmp_path / "chosen.png")
    expect(page.locator("#best")).to_have_text(label)
    assert page.locator("#preview").get_attribute("alt") == "the image chosen.png"


def test_what_is_no_image_is_said_in_words(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.http)
    expect(page.locator("#model option")).to_have_count(1)
    page.evaluate(DROP, [base64.b64encode(b"no image").decode(), "x.png"])
    expect(page.locator("#message")).to_contain_text("expected a JPEG, PNG")
    expect(page.locator("#answer")).to_be_hidden()
    context.close()


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(page):
    for name in ("Model and version", re.compile("Drop an image here")):
        expect(page.get_by_label(name).first).to_be_attached()
    reached = set()
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "file"} <= reached


def test_nothing_is_loaded_from_elsewhere_and_dark_is_dark(browser, server):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.http)
    expect(page.locator("#health")).to_have_text("ready")
    assert all(url.startswith((server.http, "data:", "blob:")) for url in asked)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    context.close()
