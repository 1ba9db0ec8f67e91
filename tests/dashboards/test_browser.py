"""The page as a person meets it, in a real Chromium; skipped where none is installed."""

import sqlite3
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from blocktune.dashboards.report import write_report
from blocktune.search.report import write_report as write_facts
from blocktune.search.run_directory import RunDirectory
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from .conftest import HOSTILE, Page, served, write_run

CUT = "node => getComputedStyle(node).getPropertyValue('--cut').trim()"
LOADED = "node => node.complete && node.naturalWidth"


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


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


VIEWS = ["", "#front/trial-1", "#front/trial-1/trial-2", "#probe", "#search"]


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(tab: Tab, page: Page, scheme: str, view: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.goto(page.url + view)
    expect(tab.locator("#main h2, #main h3").first).to_be_visible()
    if view == "#front/trial-1":
        _wait_for_map(tab)
    assert _serious(tab) == []


@pytest.mark.parametrize("view", VIEWS)
def test_a_narrow_page_is_read_without_scrolling_sideways(tab: Tab, page: Page, view: str) -> None:
    tab.set_viewport_size({"width": 360, "height": 780})
    tab.goto(page.url + view)
    expect(tab.locator("#main h2, #main h3").first).to_be_visible()
    if view == "#front/trial-1":
        _wait_for_map(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_five_lines_are_copied(tab: Tab, page: Page) -> None:
    tab.goto(f"{page.url}#front/trial-1")
    tab.get_by_role("button", name="Copy the five lines").click()
    expect(tab.get_by_role("button", name="Copied")).to_be_visible()
    lines = tab.evaluate("navigator.clipboard.readText()").strip().splitlines()
    assert len(lines) == 5
    assert 'BlockPolicy.load("balanced.json")' in lines[1]
    compile("\n".join(lines), "copied", "exec")


def test_two_policies_stand_side_by_side(tab: Tab, page: Page) -> None:
    tab.goto(f"{page.url}#front/trial-2")
    tab.get_by_label("Compare with").select_option("trial 1")
    headings = tab.get_by_role("heading", level=2)
    expect(headings).to_have_text(["Trial 2", "Trial 1balanced"])
    expect(tab.locator("rect.cell[role=img]")).to_have_count(40)
    first, second = headings.all()
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    expect(tab.locator("table", has_text="evaluator").get_by_role("columnheader", name="Trial")).to_have_count(2)
    tab.get_by_label("Compare with").select_option("nothing")
    expect(headings).to_have_text(["Trial 2"])


def test_points_are_those_of_the_report_whatever_the_scale(tab: Tab, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alignment="clip_score:reference")
    write_facts(run, {})
    write_report(run.path, tmp_path / "report.html")
    several = (
        "* **balanced**, the best of 2 by lamp:Brightness, 1.36x: clip_score:reference +3.5 [+1.8, +5.1], crispness "
    )
    assert several in run.report.read_text()
    row = next(line for line in run.report.read_text().splitlines() if line.startswith("| trial 1 "))
    alignment, quality = (cell.strip().replace("-", "−") for cell in row.split("|")[4:6])
    with served(run.path) as page:
        for url in (page.url, (tmp_path / "report.html").as_uri()):
            tab.goto(f"{url}#front/trial-1")
            expect(tab.get_by_role("region", name="Candidates").locator("tbody td.number")).to_have_text(
                ["1.25×", alignment, quality]
            )
            metrics = tab.get_by_role("region", name="Metrics").locator("tbody tr")
            expect(metrics.nth(0)).to_contain_text(alignment)
            expect(metrics.nth(1)).to_contain_text(quality)
            expect(tab.locator(".lead")).to_contain_text(f"alignment {alignment}, quality {quality} points")
            told = tab.locator(".policy .note").filter(has_text="The best of 2 pictures by lamp:Brightness")
            expect(told).to_contain_text("clip_score:reference +3.5 [+1.8, +5.1], crispness −0.5 [−1.0, +0.1].")
            label = tab.locator('[data-key="confirmed/trial-1"]').get_attribute("aria-label")
            assert f"alignment {alignment}, quality {quality} points" in str(label)
            expect(tab.get_by_text("100 points of clip_score:reference are 40")).to_be_visible()
            expect(tab.locator(".overview svg text.strong").last).to_contain_text(", points")
            tab.wait_for_load_state("networkidle")  # a picture whose page is left would count as refused
        tab.goto("about:blank")


def test_filters_take_marks_away(tab: Tab, page: Page) -> None:
    tab.goto(page.url)
    marks = tab.locator(".overview [data-key]")
    expect(marks).to_have_count(4)  # the star, two trials, and one of them confirmed
    tab.get_by_label("at least").fill("1.3")
    tab.keyboard.press("Enter")
    expect(marks).to_have_count(2)
    tab.get_by_label("confirmed", exact=True).uncheck()
    tab.get_by_label("at least").fill("0")
    tab.keyboard.press("Enter")
    expect(marks).to_have_count(3)


def test_what_the_race_dropped_is_shown_when_asked_for(tab: Tab, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with sqlite3.connect(run.path / "study.db") as database:  # Optuna itself changes no finished trial
        database.execute("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (3, 'dropped', 'true')")
    database.close()
    with served(run.path) as page:
        tab.goto(page.url)
        marks = tab.locator(".overview [data-key]")
        expect(marks).to_have_count(3)
        tab.get_by_label("dropped early").check()
        expect(marks).to_have_count(4)
        label = tab.locator('[data-key="dropped/trial-2"]').get_attribute("aria-label")
        assert "dropped on a few pictures" in str(label)
        tab.wait_for_load_state("networkidle")
    tab.goto("about:blank")


def test_the_axes_change(tab: Tab, page: Page) -> None:
    tab.goto(page.url)
    tab.get_by_label("Up", exact=True).select_option("speed-up")  # what the other axis showed: they trade places
    expect(tab.locator("svg[aria-label='speed-up against alignment, shapes']")).to_be_visible()
    tab.get_by_label("Across", exact=True).select_option("quality, crispness")
    expect(tab.locator("svg[aria-label='speed-up against quality, crispness']")).to_be_visible()


def test_the_probe_is_read_by_keyboard(tab: Tab, page: Page) -> None:
    tab.goto(page.url)
    tab.get_by_role("link", name="Probe").click()
    expect(tab.get_by_role("heading", level=3)).to_have_text(["All", "Colors"])
    maps = tab.locator("svg[aria-label^=probe]")
    expect(maps.first.locator("rect.cell")).to_have_count(10)
    expect(maps.first.locator("circle.sure")).to_have_count(4)  # at two points from zero the interval leaves it out
    maps.first.locator("rect.cell").first.focus()
    tab.keyboard.press("ArrowDown")
    expect(tab.locator(".readout").first).to_have_text("Block 0, enhance value: −2.0 [−3.5, −0.5] points")
    tab.keyboard.press("ArrowLeft")
    for _ in range(4):
        tab.keyboard.press("ArrowRight")
    told = "Block 4, enhance value: +2.0 [+0.5, +3.5] points on 2 of 8 pictures"
    expect(tab.locator(".readout").first).to_have_text(told)
    sides = maps.first.locator("rect.cell").evaluate_all("cells => cells.map(cell => cell.getBBox().width)")
    assert sides[4] == pytest.approx(sides[0] / 2)  # a quarter of the pictures, and of the area


def test_the_search_tells_workers_and_failures(tab: Tab, page: Page) -> None:
    tab.goto(f"{page.url}#search")
    expect(tab.get_by_role("img", name="Hypervolume")).to_be_visible()
    expect(tab.get_by_role("region", name="Workers").locator("tbody tr")).to_have_count(2)
    expect(tab.get_by_role("row", name="the lamp went out")).to_contain_text("3")


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
