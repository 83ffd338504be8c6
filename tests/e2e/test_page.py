"""The page in a real browser, against a real server.

`make screenshots` draws the pictures of the documents by the last test.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright

from convoy.client import Client
from tests.needs import needs_program
from tests.processes import ServerProcess, running_server
from tests.server.conftest import encode_png, publish_version
from tests.server.models.test_canary import swap_red_and_blue

CHROMIUM = shutil.which("chromium")
TOKEN = "a-token-of-tests"
# Where `make screenshots` wants them, after so many seconds of requests.
SCREENSHOTS = os.environ.get("SCREENSHOTS")
TRAFFIC_S = 290 if SCREENSHOTS else 3

pytestmark = needs_program("chromium", "chromium")

# Returns whether the browser is kept from opening the files itself.
DROP = """([files, target]) => {
  const data = new DataTransfer();
  for (const [base64, name] of files) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    data.items.add(new File([bytes], name, { type: "image/png" }));
  }
  const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  document.querySelector(target).dispatchEvent(event);
  return event.defaultPrevented;
}"""
PASTE = """([base64, name]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
}"""
RED, GREEN = (encode_png(Image.new("RGB", (6, 4), color)) for color in ("red", "lime"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`colors` in two versions, of which the second takes red for blue, and `other`."""
    folder = tmp_path_factory.mktemp("page") / "models"
    for version in ("colors/1", "colors/2", "other/1"):
        publish_version(folder / version)
    swap_red_and_blue(folder / "colors" / "2")
    return folder


@pytest.fixture(scope="module")
def served(models) -> Iterator[ServerProcess]:
    with running_server(models, "--device", "cpu", "--version-policy", "all") as process:
        yield process


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """A page without errors in its console."""
    options = {"color_scheme": "light", "viewport": {"width": 1100, "height": 900}, **options}
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    # A reply that is an error is one of the network, and not of the page.
    assert [text for text in problems if "Failed to load resource" not in text] == []


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    with opened(browser, served.url) as page:
        expect(page.locator("#health")).to_have_text("ready")
        expect(page.locator("#model option")).to_have_count(3)
        yield page


def drop(page: Page, *files: tuple[bytes, str], on: str = "#drop") -> bool:
    """Drops files; returns whether the browser was kept from opening them."""
    encoded = [[base64.b64encode(content).decode(), name] for content, name in files]
    return page.evaluate(DROP, [encoded, on])


def expect_answer(page: Page, label: str, version: int) -> None:
    expect(page.locator("#best")).to_have_text(label)
    expect(page.locator("#answered-by")).to_have_text(f"by colors, version {version}")


def hold_inference(page: Page) -> list[Route]:
    """Holds each request for inference; returns the list of those held."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/infer", hold)
    return held


def test_a_dropped_image_shows_its_class_and_the_version(page):
    drop(page, (RED, "red.png"))
    expect_answer(page, "blue", 2)
    bars = page.locator("#classes meter")
    expect(bars).to_have_count(3)
    values = [float(bars.nth(n).get_attribute("value")) for n in range(3)]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)
    stages = page.locator("#stages").inner_text()
    assert re.search(r"Decoding.*\s[0-9.]+ ms", stages)
    assert re.search(r"Inference.*\s[0-9.]+ ms", stages)
    expect(page.locator("#items")).to_be_hidden()
    page.get_by_text("JSON of the answer").click()
    answer = json.loads(page.locator("#json").inner_text())
    assert (answer["model_name"], answer["model_version"]) == ("colors", "2")


def test_an_image_can_be_pasted_or_chosen(page, tmp_path):
    page.evaluate(PASTE, [base64.b64encode(GREEN).decode(), "clipboard.png"])
    expect(page.locator("#best")).to_have_text("green")
    (tmp_path / "chosen.png").write_bytes(RED)
    page.locator("#file").set_input_files(tmp_path / "chosen.png")
    expect(page.locator("#best")).to_have_text("blue")
    assert page.locator("#preview").get_attribute("alt") == "the image chosen.png"


def test_another_model_classifies_again(page):
    drop(page, (RED, "red.png"))
    expect_answer(page, "blue", 2)
    page.locator("#model").select_option(label="colors, version 1")
    expect_answer(page, "red", 1)


def test_a_late_answer_to_an_earlier_image_is_not_shown(page):
    held = hold_inference(page)
    drop(page, (RED, "red.png"))
    expect(page.locator("#pending")).to_be_visible()
    drop(page, (GREEN, "green.png"))
    expect(page.locator("#preview")).to_have_attribute("alt", "the image green.png")
    page.wait_for_function("document.querySelector('#pending').hidden === false")
    while len(held) < 2:
        page.wait_for_timeout(20)
    held[1].continue_()
    expect_answer(page, "green", 2)
    # Its request is gone; where it is not, its answer must not be shown.
    with suppress(Error):
        held[0].fulfill(status=200, body=json.dumps({"outputs": [{"data": ["1:0:late"]}]}))
    page.wait_for_timeout(200)
    expect_answer(page, "green", 2)


def test_a_hung_server_is_shown(browser, served):
    with opened(browser, "about:blank") as page:
        page.clock.install()
        page.goto(served.url)
        expect(page.locator("#model option")).to_have_count(3)
        hold_inference(page)
        drop(page, (RED, "red.png"))
        expect(page.locator("#pending")).to_be_visible()
        page.clock.run_for(12_000)
        expect(page.locator("#waited")).to_contain_text(re.compile(r"1\d s of at most 30 s"))
        page.route("**/ui/state*", lambda route: None)
        page.clock.run_for(19_000)
        expect(page.locator("#failure")).to_have_text("no answer within 30 s")
        expect(page.locator("#pending")).to_be_hidden()
        expect(page.locator("#health")).to_contain_text("no answer within 5 s; the last one came")


def test_several_images_make_a_list(page):
    files = [(RED, "red.png"), (b"no image", "text.png"), (GREEN, "green.png")]
    drop(page, *files)
    rows = page.locator("#items li")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text(re.compile(r"red\.png.*blue, [0-9.]+ %"))
    expect(rows.nth(1)).to_contain_text(re.compile(r"text\.png.*failed"))
    expect(rows.nth(2)).to_contain_text(re.compile(r"green\.png.*green, [0-9.]+ %"))
    assert rows.nth(2).locator("img").evaluate("image => image.naturalWidth") == 6
    expect(page.locator("#best")).to_have_text("blue")
    rows.nth(1).locator("button").press("Enter")
    expect(page.locator("#failure")).to_contain_text("expected a JPEG, PNG")
    expect(page.locator("#found")).to_be_hidden()
    rows.nth(2).locator("button").press("Space")
    expect_answer(page, "green", 2)


def test_images_beyond_the_limit_are_counted(page):
    drop(page, *[(GREEN, f"{n}.png") for n in range(103)])
    expect(page.locator("#message")).to_contain_text("3 of 103 images were left out")
    expect(page.locator("#items li")).to_have_count(100)
    expect(page.locator("#items .done")).to_have_count(100, timeout=60_000)


def test_a_drop_beside_the_zone_does_not_leave_the_page(page):
    assert drop(page, (GREEN, "green.png"), on="footer")
    expect_answer(page, "green", 2)
    assert drop(page, on="footer")
    expect(page.locator("#message")).to_have_text("what was dropped holds no file")


def test_an_example_is_classified(page, models):
    examples = page.get_by_role("button", name=re.compile("Classify example"))
    expect(examples).to_have_count(8)
    with np.load(models / "colors" / "2" / "samples.npz") as samples:
        best = samples["logits"].argmax(axis=1)
    # One of each class comes first.
    firsts = sorted(np.unique(best, return_index=True)[1])
    labels = [("red", "green", "blue")[best[first]] for first in firsts]
    assert len(labels) > 1
    for nth, label in enumerate(labels):
        examples.nth(nth).click()
        expect(page.locator("#best")).to_have_text(label)


def test_charts_are_of_the_chosen_model(browser, served):
    with Client(served.address) as client:
        for _ in range(20):
            client.classify(RED, model="other")
    with opened(browser, served.url) as page:
        totals = page.locator("#totals")
        chosen = page.locator("#traffic-of")
        chosen.select_option("other")
        expect(totals).to_have_text(
            re.compile(r"^[2-9]\d requests answered, 0 failed"), timeout=15_000
        )
        latency = page.locator("figure").filter(has_text="Latency")
        expect(latency).to_contain_text(re.compile(r"p50 [0-9.,]+ m?s\s*p90 [0-9.,]+ m?s"))
        expect(latency.locator("canvas")).to_be_visible()
        label = latency.get_by_role("img").get_attribute("aria-label")
        assert re.match(r"Latency over the last five minutes: p50 [0-9.,]+ m?s", label)
        everything = page.locator("#charts").inner_text()
        assert not re.search(r"\de[+-]\d", everything)
        # Under the pointer the readout is that of one interval, and names its time.
        latency.locator(".u-over").hover()
        expect(latency).to_contain_text(re.compile(r"\d+:\d\d:\d\d"))
        page.locator("h1").hover()
        expect(latency).not_to_contain_text(re.compile(r"\d+:\d\d:\d\d"))


@pytest.mark.parametrize(
    ("value", "text"), [(1530, "1,530"), (0.000012, "0.000012"), (12.345, "12.3"), (None, "\u2013")]
)
def test_numbers_are_readable(page, value, text):
    script = "async (value) => (await import('/format.js')).number(value)"
    assert page.evaluate(script, value) == text


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("language", ["curl", "Python", "grpcurl"])
def test_the_request_that_is_offered_gives_the_same_answer(page, tmp_path, language, version):
    command = ["bash", "-euc"] if language != "Python" else [sys.executable, "-c"]
    if language != "Python" and not shutil.which(language):
        pytest.skip(f"{language} is not installed")
    name = "it's red.png"
    (tmp_path / name).write_bytes(RED)
    page.locator("#file").set_input_files(tmp_path / name)
    if version == 1:
        page.locator("#model").select_option(label="colors, version 1")
    expect_answer(page, "red" if version == 1 else "blue", version)
    page.get_by_role("tab", name=language, exact=True).click()
    text = page.locator("#request").inner_text()
    done = subprocess.run(
        [*command, text], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    first = min(["red", "green", "blue"], key=done.stdout.find)
    assert first == ("red" if version == 1 else "blue"), done.stdout


def test_the_request_can_be_copied(browser, served):
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, served.url, permissions=permissions) as page:
        expect(page.locator("#request")).to_contain_text("/v2/models/colors/infer")
        page.locator("#copy").click()
        expect(page.locator("#copied")).to_have_text("copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.locator("#request").text_content()


def test_a_secured_server_asks_for_its_token(browser, models, tmp_path):
    (tmp_path / "tokens").write_text(TOKEN)
    flags = ("--device", "cpu", "--token-file", tmp_path / "tokens")
    with running_server(models, *flags) as secured, opened(browser, secured.url) as page:
        field = page.get_by_label("Access token")
        expect(page.locator("#health")).to_have_text("a valid access token is needed")
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#health")).to_have_text("a valid access token is needed")
        field.fill(TOKEN)
        field.press("Enter")
        expect(page.locator("#health")).to_have_text("ready")
        drop(page, (RED, "red.png"))
        expect(page.locator("#best")).to_have_text("blue")
        expect(page.get_by_role("button", name="Classify example 1")).to_be_visible()
        assert "$CONVOY_TOKEN" in page.locator("#request").inner_text()
        assert TOKEN not in page.content()


@pytest.mark.parametrize("width_px", [320, 1100, 2400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_at_every_width(browser, served, scheme, width_px):
    size = {"width": width_px, "height": 900}
    with opened(browser, served.url, color_scheme=scheme, viewport=size) as page:
        expect(page.locator("#health")).to_have_text("ready")
        drop(page, (RED, "red.png"), (b"no image", "a-name-without-any-space" * 9 + ".png"))
        expect(page.locator("#items .done")).to_have_count(1)
        expect(page.locator("#items .failed")).to_have_count(1)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width_px
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", background)[:3]]
        assert max(levels) < 60 if scheme == "dark" else min(levels) > 200


def test_every_control_can_be_reached_by_keyboard(page):
    expect(page.get_by_role("button", name="Classify example 8")).to_be_visible()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        name = "document.activeElement.id || document.activeElement.ariaLabel"
        reached.add(page.evaluate(name))
    assert {"model", "file", "traffic-of", "language-curl", "copy", "request"} <= reached
    assert {f"Classify example {n}" for n in range(1, 9)} <= reached
    page.locator("#language-curl").press("ArrowRight")
    expect(page.locator("#request")).to_contain_text("from convoy.client import Client")


def test_the_api_has_a_page(browser, served):
    with opened(browser, f"{served.url}/docs") as page:
        expect(page.locator("article")).to_have_count(9)
        expect(page.locator("#modelInfer")).to_contain_text("/v2/models/{model}/infer")
        page.locator("#modelInfer details").first.locator("summary").click()
        expect(page.locator("#modelInfer pre").first).to_contain_text('"datatype"')
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_nothing_is_loaded_from_elsewhere(browser, served):
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for path in ("/", "/docs"):
        reply = page.goto(served.url + path)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        page.wait_for_load_state("networkidle") if path == "/docs" else expect(
            page.locator("#health")
        ).to_have_text("ready")
    assert len(asked) > 8
    assert all(url.startswith((served.url, "data:", "blob:")) for url in asked)
    context.close()


def test_screenshots_are_drawn_from_the_running_page(browser, server, repository, tmp_path):
    with np.load(repository / "digits" / "1" / "samples.npz") as samples:
        encoded, offsets = samples["encoded"], samples["encoded_offsets"]
    files = [encoded[start:end].tobytes() for start, end in pairwise(offsets)]
    send_for(TRAFFIC_S, server, files)
    folder = Path(SCREENSHOTS or tmp_path)
    for scheme in ("light", "dark"):
        with opened(browser, server.url, color_scheme=scheme) as page:
            drop(page, *[(file, f"digit-{n}.png") for n, file in enumerate(files[:4])])
            expect(page.locator("#items .done")).to_have_count(4)
            expect(page.locator("#totals")).not_to_have_text(
                re.compile("^0 requests"), timeout=15_000
            )
            picture = folder / ("page.png" if scheme == "light" else "page-dark.png")
            page.screenshot(path=picture, full_page=True)
            with Image.open(picture) as drawn:
                assert drawn.width == 1100
                # The three colors of the charts' lines.
                assert len(drawn.convert("RGB").getcolors(1 << 20)) > 300


def send_for(seconds: float, server: ServerProcess, files: list[bytes]) -> None:
    """Sends images at a rate that rises and falls."""
    started_s = time.monotonic()
    with Client(server.address) as client:
        while (passed_s := time.monotonic() - started_s) < seconds:
            list(client.classify_many(files, in_flight=4))
            time.sleep(0.2 + 0.15 * np.sin(passed_s / 20))
