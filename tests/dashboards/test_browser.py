"""The page as a person meets it, in a real Chromium; skipped where none is installed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from blocktune.dashboards.report import write_report
from blocktune.search.run_directory import RunDirectory
from playwright.sync_api import Browser, expect, sync_playwright
from playwright.sync_api import Page as Tab

from .conftest import HOSTILE, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

CUT = "node => getComputedStyle(node).getPropertyValue('--cut').trim()"
LOADED = "node => node.complete && node.naturalWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab that fails its test for any error the browser tells: of a script, a refused source, a missing file."""
    tab, errors = browser.new_page(viewport={"width": 1300, "height": 900}), []
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("requestfailed", lambda request: errors.append(f"{request.url} {request.failure}"))
    yield tab
    tab.close()
    assert errors == []


def _serious(tab: Tab) -> list[str]:
    found = Axe().run(tab).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


def _wait_for_map(tab: Tab) -> None:
    expect(tab.locator("rect.cell[role=img]")).to_have_count(20)


def test_a_click_on_a_point_shows_its_pictures(tab: Tab, page: Page) -> None:
    tab.goto(page.url)
    tab.locator('[data-key="confirmed/trial-1"]').click()
    expect(tab.get_by_role("heading", level=2)).to_contain_text("Trial 1")
    _wait_for_map(tab)
    picture = tab.get_by_alt_text("Trial 1: ", exact=False).first
    picture.scroll_into_view_if_needed()
    expect(picture).to_have_class("after pixels")  # set once it is loaded
    assert picture.evaluate(LOADED) == 48
    expect(tab.locator("figcaption", has_text=HOSTILE).first).to_be_attached()
    assert tab.title() == "trial-1 · tiny · blocktune"


def test_a_download_comes_from_the_page(tab: Tab, page: Page, run: RunDirectory) -> None:
    tab.goto(f"{page.url}#front/trial-1")
    with tab.expect_download() as waited:
        tab.get_by_role("link", name="Download balanced.json").click()
    assert waited.value.suggested_filename == "balanced.json"
    assert Path(waited.value.path()).read_bytes() == (run.policies / "balanced.json").read_bytes()


def test_the_bands_of_the_map_are_named(tab: Tab, page: Page) -> None:
    tab.goto(f"{page.url}#front/trial-1")
    _wait_for_map(tab)
    names = tab.locator("svg[aria-label^=map] text.strong")
    expect(names).to_have_text(["double-stream", "single-stream"])
    first = tab.locator("rect.cell[role=img]").first
    label, cell = names.first.bounding_box(), first.bounding_box()
    chart = tab.locator("svg[aria-label^=map]").bounding_box()
    assert label
    assert cell
    assert chart
    assert chart["y"] <= label["y"]
    assert label["y"] + label["height"] <= cell["y"] + 3  # descenders may touch the row


def test_the_keyboard_alone_opens_and_reads_a_policy(tab: Tab, page: Page) -> None:
    tab.goto(page.url)
    expect(tab.locator(".point").first).to_be_attached()
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.classList.contains('point')"):
            break
    order = "[...document.querySelectorAll('[data-key]')].sort((a, b) => a.mark.at.speed - b.mark.at.speed)"
    for _ in range(6):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate(f"{order}.at(-1) === document.activeElement")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("heading", level=2)).to_be_focused()
    expect(tab.get_by_role("heading", level=2)).to_have_text("Trial 2")
    _wait_for_map(tab)
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.classList.contains('cell')"):
            break
    for key in ("ArrowRight", "ArrowRight", *["ArrowDown"] * 4):
        tab.keyboard.press(key)
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Block 4, step 2: is skipped"


def test_the_line_between_two_pictures_moves(tab: Tab, page: Page) -> None:
    tab.goto(f"{page.url}#front/trial-1")
    wipes = tab.locator(".wipe")
    one = wipes.first.get_by_role("slider")
    one.focus()
    tab.keyboard.press("End")
    assert wipes.first.evaluate(CUT) == "100%"
    assert wipes.nth(1).evaluate(CUT) != "100%"
    tab.get_by_label("Move the line of every picture").focus()
    tab.keyboard.press("Home")
    assert set(wipes.evaluate_all(f"nodes => nodes.map({CUT})")) == {"0%"}


@pytest.mark.parametrize("view", ["", "#front/trial-1", "#front/trial-2", "#search"])
def test_axe_finds_nothing_serious(tab: Tab, page: Page, scheme: str, view: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.goto(page.url + view)
    expect(tab.locator("#main h2, #main h3").first).to_be_visible()
    if "/" in view:
        _wait_for_map(tab)
    assert _serious(tab) == []


def test_dark_mode_is_dark(tab: Tab, page: Page) -> None:
    brightness = (
        "Math.max(...getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    found = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.goto(page.url)
        found[scheme] = tab.evaluate(brightness)
    assert found["dark"] < 64 < 192 < found["light"]


def test_a_report_opens_from_disk(tab: Tab, run: RunDirectory, tmp_path: Path) -> None:
    write_report(run.path, tmp_path / "report.html")
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    tab.locator('[data-key="confirmed/trial-1"]').click()
    _wait_for_map(tab)
    picture = tab.get_by_alt_text("Trial 1: ", exact=False).first
    picture.scroll_into_view_if_needed()
    expect(picture).to_have_class("after pixels")
    with tab.expect_download() as waited:
        tab.get_by_role("link", name="Download balanced.json").click()
    assert Path(waited.value.path()).read_bytes() == (run.policies / "balanced.json").read_bytes()
    assert {url.split(":", 1)[0] for url in asked} <= {"file", "data"}
    assert _serious(tab) == []
