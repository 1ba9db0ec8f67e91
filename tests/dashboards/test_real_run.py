"""The page over what a real search of a tiny model wrote."""

import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from blocktune.dashboards.server import create_app
from blocktune.search.storage import STUDY
from PIL import Image
from playwright.sync_api import expect
from starlette.testclient import TestClient

from ..search.conftest import HANG, new_world, tiny_model  # noqa: F401  (fixtures)
from .conftest import served


@pytest.fixture(scope="module")
def world(new_world):  # noqa: F811
    made = new_world(trials=7)
    made.pause = 1.5  # seconds of a scoring, so that a page that looks late still sees some of it
    return made


@pytest.fixture(scope="module")
def driver(world) -> subprocess.Popen[bytes]:
    (world.cwd / "runs" / "tiny").mkdir(parents=True)
    return world.start("search", world.config)


@pytest.fixture(scope="module")
def run(world, driver) -> Path:
    assert driver.wait(HANG) == 0, (world.folder / "stderr.txt").read_text()
    return world.cwd / "runs" / "tiny"


def test_the_page_follows_a_search(world, driver, tab):
    """Opened on an empty folder and never loaded again."""
    with served(world.cwd / "runs" / "tiny") as page:
        tab.goto(page.url)
        said, marks = tab.get_by_role("status"), tab.locator("[data-key^=trial], [data-key^=anchor], [data-key^=star]")
        seen = []
        for count in (1, 2, 3):  # of a scoring's time each, so that one or two come between two looks
            expect(marks.nth(count)).to_be_attached(timeout=1000 * HANG)
            seen.append((marks.count(), said.inner_text()))
        assert driver.poll() is None, "the search ended before the page was seen to follow it"
        assert all(re.fullmatch(r"Searching: \d of 7 trials are done\.", sentence) for _, sentence in seen), seen
        expect(said).to_contain_text("candidates confirmed", timeout=1000 * HANG)
        expect(tab.locator("[data-key^=confirmed]").first).to_be_attached()


@pytest.fixture(scope="module")
def client(run) -> TestClient:
    return TestClient(create_app(run, ["testserver"]))


def test_trials_are_those_of_the_study(client, run):
    told = client.get("/api/run").json()
    assert told["state"] == "finished"
    assert len(told["trials"]["number"]) == 7
    trials = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{run / 'study.db'}").get_trials()
    same = [trial.number for trial in trials if "same_as" in trial.user_attrs]
    assert sum(w["trials"] for w in told["search"]["workers"]) == 7 - len(same)  # which no worker had
    assert len(same) == 1  # late reuse 6: of so few steps it does what late reuse 4 does
    assert all(0 < w["load"] <= 1 for w in told["search"]["workers"])
    before, after = (pd.read_parquet(run / "scores" / f"trial-000{i}.parquet") for i in (0, 1))
    gained = after["lamp:Brightness"].mean() - before["lamp:Brightness"].mean()
    assert told["trials"]["alignment"][:2] == pytest.approx([0, 100 * gained], abs=1e-4)
    confirmed = json.loads((run / "confirmed.json").read_text())["confirmed"]
    assert {c["name"] for c in told["confirmed"]} == {c["name"] for c in confirmed}
    assert told["margins"] == [1.5, 3.0]


def test_a_candidate_has_its_plan_and_its_pictures(client, run):
    member = next(c for c in client.get("/api/run").json()["confirmed"] if c["rules"])
    told = client.get(f"/api/candidates/{member['slug']}").json()
    assert told["confirmed"]
    assert told["speedup"] == member["speedup"]
    assert "lamp:Brightness" in [m["name"] for m in told["metrics"]]
    plan = client.get(f"/api/plans/{member['slug']}")
    assert plan.status_code == 200, plan.text
    picture = client.get(f"/pictures/{told['pictures']['after']}/1.png")
    with np.load(run / "images" / f"{told['pictures']['after']}.npz") as stored:
        expected = stored["images"][1]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.content))), expected)


def test_a_download_is_the_file_on_disk(client, run):
    files = list((run / "policies").glob("*.json"))
    assert files
    for path in files:
        assert client.get(f"/policies/{path.name}").content == path.read_bytes()
