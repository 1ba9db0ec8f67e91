"""The page over what a real search of a tiny model wrote."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blocktune.dashboards.server import create_app
from PIL import Image
from starlette.testclient import TestClient

from ..search.conftest import new_world, tiny_model  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def run(new_world) -> Path:  # noqa: F811
    world = new_world(trials=7)
    world.pause = 0
    world.run("search", world.config)
    return world.cwd / "runs" / "tiny"


@pytest.fixture(scope="module")
def client(run) -> TestClient:
    return TestClient(create_app(run, ["testserver"]))


def test_trials_are_those_of_the_study(client, run):
    told = client.get("/api/run").json()
    assert told["state"] == "finished"
    assert len(told["trials"]["number"]) == 7
    scores = pd.read_parquet(run / "scores" / "trial-0000.parquet")
    assert told["trials"]["alignment"][0] == pytest.approx(scores["lamp:Brightness"].mean(), abs=1e-5)
    confirmed = json.loads((run / "confirmed.json").read_text())["confirmed"]
    assert {c["name"] for c in told["confirmed"]} == {c["name"] for c in confirmed}
    assert told["quality_margin"] == 0.03


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
