"""The page's answers are the run's files, and nothing else can be had from it."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blocktune.dashboards.report import write_report
from blocktune.dashboards.server import create_app
from PIL import Image
from starlette.testclient import TestClient

HOST = "testserver"


def client_of(root: Path) -> TestClient:
    return TestClient(create_app(root, [HOST]), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(run) -> TestClient:
    return client_of(run)


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


@pytest.mark.parametrize(
    "address",
    [
        "/api/nothing", "/api/candidates/nobody", "/nothing.html", "/study.db", "/pictures/unmodified/9999.png",
        "/policies/..%2Fconfig.json", "/pictures/..%2F..%2Fetc%2Fpasswd/0.png", "/%2e%2e/config.yaml",
        "/policies/%252e%252e%252fconfig.json", "/pictures/unmodified/-1.png",
    ],
)  # fmt: skip
def test_what_is_not_of_the_page_is_missing(client, address):
    answer = client.get(address)
    assert answer.status_code in (404, 422)
    assert "Traceback" not in answer.text


def test_links_out_of_the_run_lead_nowhere(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (copy / "policies" / "secret.json").symlink_to(secret)
    assert client_of(copy).get("/policies/secret.json").status_code == 404


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch", "options"])
def test_only_get_is_answered(client, method):
    assert getattr(client, method)("/api/run").status_code == 405


def test_another_sites_name_is_refused(client):
    assert client.get("/api/run", headers={"host": "evil.example"}).status_code == 400


def test_nothing_may_be_loaded_from_elsewhere_or_written_into_the_page(client):
    for address in ("/", "/page.js", "/style.css", "/api/run", "/nothing"):
        policy = client.get(address).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
    page = client.get("/").text
    assert not re.search(r"<script>|\son\w+=|style=", page)


@pytest.mark.parametrize("kind", ["empty", "foreign", "broken"])
def test_other_folders_get_a_sentence(run, tmp_path, kind):
    root = tmp_path / kind
    root.mkdir()
    if kind == "foreign":
        (root / "config.yaml").write_text("a: 1\n")
    if kind == "broken":
        shutil.copytree(run, root, dirs_exist_ok=True)
        (root / "confirmed.json").write_text("{")
    client = client_of(root)
    told = client.get("/api/run").json()
    assert told["state"] == ("empty" if kind == "empty" else "broken")
    assert told["sentence"].endswith(".")
    assert {"foreign": "config.yaml", "broken": "confirmed.json", "empty": "holds no run"}[kind] in told["sentence"]
    assert client.get("/").status_code == 200


def test_the_report_is_one_file_without_addresses(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in (copy / "scores").glob("*.parquet"):
        table = pd.read_parquet(path)
        table["prompt"] = "</script><script>alert(1)</script>"
        table.to_parquet(path)
    write_report(copy, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert len(page.encode()) < 5 * 2**20
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert "<script>alert(1)" not in page


@pytest.mark.parametrize("command", ["dashboard", "report"])
def test_a_wrong_folder_is_one_sentence(tmp_path, command):
    more = ["-o", str(tmp_path / "out.html")] if command == "report" else ["--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "blocktune.search", command, str(tmp_path / "nowhere"), *more],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("blocktune: ")
    assert len(done.stderr.strip().splitlines()) == 1
