"""The page in a real headless Chromium: by mouse and by keyboard, live, dark, and for a screen reader."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from blocktune.dashboards.report import write_report
from blocktune.dashboards.server import create_app

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")


@pytest.fixture(scope="module")
def address(run) -> Iterator[str]:
    """The page, served for real on a free port."""
    server = uvicorn.Server(uvicorn.Config(create_app(run, ["127.0.0.1"]), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address) -> Iterator[object]:
    """A fresh page with the run drawn; whatever it complains of fails the test."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name=re.compile("^unmodified", re.IGNORECASE)).first.wait_for()
    yield page
    page.close()
    assert complaints == []


def a_point(page):
    return page.get_by_role("button", name=re.compile(r"^late reuse 3\b", re.IGNORECASE)).first


def test_a_click_on_a_point_shows_its_policy_and_pictures(page):
    a_point(page).click(force=True)  # where points meet, the one on top
    page.get_by_role("region", name="Policy").get_by_role("heading").first.wait_for()
    page.locator("img").first.wait_for()
    assert page.locator("img").count() >= 2
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert "apply_policy" in page.get_by_label("Code that applies the policy").inner_text()


def test_the_keyboard_alone_is_enough(page):
    a_point(page).focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=re.compile("late reuse 3", re.IGNORECASE)).wait_for()
    slider = page.get_by_label("Move the line of every picture")
    slider.wait_for()
    slider.focus()
    before = slider.input_value()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() != before


def test_the_download_is_the_file_on_disk(page, run, tmp_path):
    a_point(page).click(force=True)
    with page.expect_download() as waited:
        page.get_by_role("link", name=re.compile("^Download")).first.click()
    waited.value.save_as(tmp_path / "policy.json")
    assert (tmp_path / "policy.json").read_bytes() in {p.read_bytes() for p in (run / "policies").glob("*.json")}


def test_dark_is_dark_and_narrow_fits(browser, address):
    colors = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 420, "height": 800})
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button", name=re.compile("^unmodified", re.IGNORECASE)).first.wait_for()
        colors[scheme] = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") + page.evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        context.close()
    assert colors["light"] != colors["dark"]


def test_nothing_serious_for_a_screen_reader(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for step in (lambda: None, lambda: a_point(page).click(force=True)):
        step()
        page.wait_for_timeout(500)
        found = axe.Axe().run(page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == []


def test_the_report_works_from_a_file(browser, run, tmp_path: Path):
    write_report(run, tmp_path / "report.html")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    a_point(page).wait_for()
    a_point(page).click(force=True)
    page.locator("img").first.wait_for()
    page.close()
    assert complaints == []
