"""The page over HTTP: what it tells is what the files say, and it tells nothing else to nobody else."""

import io
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from blocktune.dashboards.answers import answer
from blocktune.dashboards.files import Missing, RunFiles
from blocktune.dashboards.standing import scales_of
from blocktune.policies import BlockPolicy
from blocktune.search.config import Config, Search
from blocktune.search.report import write_report
from blocktune.search.run_directory import RunDirectory
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from .conftest import HOSTILE, STEPS, Page, write_run


def _held_out(run: RunDirectory) -> str:
    return next(p.stem for p in run.images.glob("confirm-*.npz") if p.stem != "confirm-unmodified")


def test_the_run_is_told_as_its_files_say(run: RunDirectory, page: Page) -> None:
    told, record = page.json("/api/run"), json.loads(run.confirmed.read_text())
    assert (told["name"], told["state"]) == ("tiny", "finished")
    trials = told["trials"]
    assert trials["name"] == ["unmodified", "trial 1", "trial 2", "trial 3"]
    assert trials["state"] == ["complete"] * 3 + ["fail"]
    assert trials["reason"] == [None] * 3 + ["the lamp went out"]
    before = run.read_scores("unmodified")
    for number in range(3):
        after = run.read_scores(f"trial-{number:04d}")
        gains = {e: 100 * (after[e] - before[e]).mean() for e in ("shapes", "crispness")}
        assert trials["alignment"][number] == pytest.approx(gains["shapes"], abs=1e-4)
        assert trials["quality"][number] == pytest.approx(gains["crispness"], abs=1e-4)
        assert trials["latency"][number] == pytest.approx(1 - 0.2 * number)
    (confirmed,), (stored,) = told["confirmed"], record["confirmed"]
    assert confirmed["speedup"] == stored["speedup"]
    assert confirmed["picks"] == ["balanced"]
    assert confirmed["alignment"]["low"] == pytest.approx(100 * stored["alignment"]["low"], abs=1e-4)


def test_a_search_that_ended_early_is_finished_and_a_dropped_trial_stands_nowhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = run.load_config()
    run.write_text(run.config, config.model_copy(update={"search": Search(trials=9)}).model_dump_json())
    whole = answer(RunFiles(run.path), "api/run")
    with sqlite3.connect(run.path / "study.db") as database:  # Optuna itself changes no finished trial
        sentence = json.dumps("search.patience: the hypervolume has not grown in 2 trials")
        database.execute(
            "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, 'ended', ?)", [sentence]
        )
        database.execute("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (3, 'dropped', 'true')")
        query = "UPDATE trial_user_attributes SET value_json = json_set(value_json, '$.images', 2)"
        database.execute(f"{query} WHERE trial_id = 3 AND key = 'metrics'")
    database.close()
    run.read_scores("trial-0002")[:2].to_parquet(run.scores / "trial-0002.parquet", index=False)
    told = answer(RunFiles(run.path), "api/run")
    assert (whole["state"], told["state"]) == ("searching", "finished")
    assert (whole["trials"]["front"][2], told["trials"]["front"][2]) == (True, False)
    assert (whole["trials"]["dropped"][2], told["trials"]["dropped"][2]) == (False, True)
    assert (whole["hypervolume"]["images"], told["hypervolume"]["images"]) == ([0, 4, 8, 12], [0, 4, 8, 10])
    assert len(answer(RunFiles(run.path), "api/candidates/trial-2")["pairs"]["seed"]) == 2


def test_a_candidate_is_told_picture_by_picture(run: RunDirectory, page: Page) -> None:
    told = page.json("/api/candidates/trial-1")
    before, after = run.read_scores("confirm-unmodified"), run.read_scores(_held_out(run))
    assert told["pairs"]["prompt"] == before["prompt"].tolist()
    assert told["pairs"]["alignment_before"] == before["shapes"].round(4).tolist()
    assert told["pairs"]["alignment_after"] == after["shapes"].round(4).tolist()
    assert told["pictures"]["count"] == 8
    assert told["files"] == ["balanced", "trial-1"]
    kinds = {k["kind"]: k["alignment"]["delta"] for k in told["kinds"]}
    gains = (after["shapes"] - before["shapes"]).groupby(before["kind"]).mean()
    assert kinds == pytest.approx((100 * gains).to_dict(), abs=1e-4)


def _differences(root: Path) -> list[float]:
    """Everything that the page tells in points."""
    run, *candidates = (answer(RunFiles(root), f"api/{a}") for a in ("run", "candidates/trial-1", "candidates/trial-2"))
    intervals = [c[role] for c in run["confirmed"] for role in ("alignment", "quality")]
    for one in candidates:
        intervals += one["metrics"] + [kind[role] for kind in one["kinds"] for role in ("alignment", "quality")]
    ends = [i[k] for i in intervals for k in ("delta", "low", "high") if k in i]
    return [*run["trials"]["alignment"][:3], *run["trials"]["quality"][:3], *run["hypervolume"]["value"], *ends]


def test_a_score_forty_times_as_wide_makes_the_same_points(run: RunDirectory, tmp_path: Path) -> None:
    wide = _differences(write_run(tmp_path / "run", alignment="clip_score:reference").path)
    assert wide == pytest.approx(_differences(run.path), abs=2e-4)
    assert wide[1] > 1


def test_the_page_and_the_report_tell_the_same_points(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alignment="clip_score:reference")
    write_report(run, {})
    head, _, row = (line for line in run.report.read_text().splitlines() if line.startswith("|"))
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row)), strict=True))
    alignment, quality, psnr = answer(RunFiles(run.path), "api/candidates/trial-1")["metrics"]
    for told in (alignment, quality):
        assert cells[told["name"]] == f"{told['delta']:+.1f} [{told['low']:+.1f}, {told['high']:+.1f}]"
    assert cells["psnr"] == f"{psnr['value']:.1f} dB"
    assert (alignment["name"], alignment["scale"]) == ("clip_score:reference", 40.0)
    assert "100 points of clip_score:reference are 40)" in run.report.read_text()


def test_an_older_run_is_asked_of_the_evaluators_and_never_of_code_it_names(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alignment="clip_score:reference")
    kept = answer(RunFiles(run.path), "api/candidates/trial-2")
    with sqlite3.connect(run.path / "study.db") as database:
        query = "UPDATE study_user_attributes SET value_json = json_remove(value_json, '$.scales')"
        assert database.execute(f"{query} WHERE key = 'description'").rowcount == 1
    database.close()
    assert answer(RunFiles(run.path), "api/candidates/trial-2") == kept
    named = Config.model_validate({"objectives": {"alignment": "os:abort", "reported": ["hps_v2.1", "hps_v2.1:gone"]}})
    assert scales_of({}, named) == {"os:abort": 1.0, "crispness": 1.0, "hps_v2.1": 0.15, "hps_v2.1:gone": 1.0}


def test_pictures_are_exact(run: RunDirectory, page: Page) -> None:
    for name in ("confirm-unmodified", _held_out(run)):
        for index in (0, 7):
            status, headers, body = page.ask(f"/pictures/{name}/{index}.png")
            assert (status, headers["Content-Type"]) == (200, "image/png")
            assert (np.asarray(Image.open(io.BytesIO(body))) == run.read_images(name)[index]).all()


def test_the_map_follows_the_rules_and_names_both_streams(page: Page) -> None:
    told = page.json("/api/plans/trial-1")
    (layout,) = told["branches"]
    assert layout["kinds"] == ["cccc", "crcr", "cccc", "crcr", "cccc"]
    assert layout["scales"] == [[1, 1, 0, 0], [1, 0, 0, 0], *[[0] * STEPS] * 3]  # a block that reuses hears nothing
    assert layout["counts"] == {"computed": 16, "skipped": 0, "reused": 4, "scaled": 3}
    assert told["bands"] == [
        {"name": "double-stream", "first": 0, "count": 2},
        {"name": "single-stream", "first": 2, "count": 3},
    ]


def test_a_download_is_the_file(run: RunDirectory, page: Page) -> None:
    for name in ("balanced", "trial-1"):
        assert page.ask(f"/policies/{name}.json")[2] == (run.policies / f"{name}.json").read_bytes()


def test_a_download_of_what_was_not_confirmed_is_what_the_search_stored(
    run: RunDirectory, page: Page, tmp_path: Path
) -> None:
    (tmp_path / "policy.json").write_bytes(page.ask("/policies/trial-2.json")[2])
    stored = sqlite3.connect(run.path / "study.db")
    query = (
        "SELECT value_json FROM trial_user_attributes JOIN trials USING (trial_id) WHERE number = 2 AND key = 'policy'"
    )
    (text,) = stored.execute(query).fetchone()
    stored.close()
    assert BlockPolicy.load(tmp_path / "policy.json").rules == BlockPolicy.model_validate(json.loads(text)).rules


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml", "/%2e%2e/config.yaml", "/..%2fconfig.yaml", "/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/config.yaml", "/study.db", "/static/page.js", "/policies/..%2fconfirmed.json",
        "/policies/%2e%2e%2fconfirmed.json", "/policies/..%5cconfirmed.json", "/policies/balanced%00.json",
        "/policies/nothing.json",
        "/pictures/..%2fimages%2fconfirm-unmodified/0.png", "/pictures/%2e%2e/0.png", "/pictures/nothing/0.png",
        "/pictures/confirm-unmodified/8.png", "/pictures/confirm-unmodified/-1.png", "/api/", "/api/nothing",
        "/api/candidates/nothing", "/api/candidates/..", "/api/candidates/%2e%2e%2frun", "/api/candidates/trial-3",
        "/api/plans/nothing", "/api/probes", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_what_is_not_of_this_page_is_404(page: Page, path: str) -> None:
    status, headers, body = page.ask(path)
    assert status == 404
    assert headers["Content-Security-Policy"]
    assert b"Traceback" not in body


def test_a_link_that_leads_outside_is_404(run: RunDirectory, page: Page, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"word": "sesame"}')
    (tmp_path / "secret.npz").write_bytes((run.images / "confirm-unmodified.npz").read_bytes())
    links = {run.policies / "linked.json": secret, run.images / "linked.npz": tmp_path / "secret.npz"}
    for link, target in links.items():
        link.symlink_to(target)
    try:
        status, _, body = page.ask("/policies/linked.json")
        assert status == 404
        assert b"sesame" not in body
        assert page.ask("/pictures/linked/0.png")[0] == 404
    finally:
        for link in links:
            link.unlink()


@given(st.text() | st.text(alphabet="./\\\0a"))
def test_no_name_leads_outside_of_the_run(run: RunDirectory, name: str) -> None:
    files = RunFiles(run.path)
    for parts in ((name,), ("policies", name)):
        try:
            found = files.path(*parts)
        except Missing:
            continue
        assert found.resolve().is_relative_to(run.path.resolve())
        assert found.parent.resolve() == files.root.joinpath(*parts[:-1])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/api/run", "/policies/balanced.json"])
def test_only_get_is_answered(page: Page, method: str, path: str) -> None:
    status, headers, _ = page.ask(path, method)
    assert (status, headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "169.254.169.254"])
def test_a_foreign_host_is_refused(page: Page, host: str) -> None:
    for path in ("/", "/api/run", "/pictures/confirm-unmodified/0.png"):
        status, _, body = page.ask(path, headers={"Host": host})
        assert status == 400
        assert b"tiny" not in body


@pytest.mark.parametrize("path", ["/", "/page.js", "/style.css", "/api/run", "/pictures/confirm-unmodified/0.png"])
def test_every_answer_carries_a_strict_policy(page: Page, path: str) -> None:
    status, headers, _ = page.ask(path)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert status == 200
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'",) * 3
    assert (policy["base-uri"], policy["form-action"], policy["frame-ancestors"]) == ("'none'",) * 3
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_prompt_of_markup_stays_text(page: Page) -> None:
    _, headers, body = page.ask("/api/candidates/trial-1")
    assert headers["Content-Type"] == "application/json"
    assert HOSTILE in json.loads(body)["pairs"]["prompt"]
    assert b"<script>document" not in page.ask("/")[2]


def test_nothing_is_sent_twice(page: Page) -> None:
    tag = page.ask("/api/run")[1]["ETag"]
    status, _, body = page.ask("/api/run", headers={"If-None-Match": tag})
    assert (status, body) == (304, b"")
    assert page.ask("/api/run", headers={"If-None-Match": '"other"'})[0] == 200


def _no_config(path: Path) -> None:
    (path / "holiday.txt").write_text("sun")


def _foreign_config(path: Path) -> None:
    (path / "config.yaml").write_text("services: {web: {image: nginx}}\n")


def _broken_config(path: Path) -> None:
    (path / "config.yaml").write_text("name: [\n")


def _broken_study(path: Path) -> None:
    (path / "config.yaml").write_text("name: tiny\n")
    (path / "study.db").write_bytes(b"no database at all" * 100)


def _foreign_study(path: Path) -> None:
    (path / "config.yaml").write_text("name: tiny\n")
    with sqlite3.connect(path / "study.db") as database:
        database.execute("CREATE TABLE holidays (place TEXT)")
    database.close()


def _broken_confirmed(path: Path) -> None:
    (path / "config.yaml").write_text("name: tiny\n")
    (path / "confirmed.json").write_text('{"confirmed": [{}]}')


@pytest.mark.parametrize(
    ("spoil", "state", "word"),
    [
        (lambda path: None, "empty", "holds no run"),
        (_no_config, "empty", "holds no run"),
        (_foreign_config, "broken", "config.yaml is of no search: services"),
        (_broken_config, "broken", "config.yaml cannot be read"),
        (_broken_study, "broken", "study.db cannot be read"),
        (_foreign_study, "broken", "study.db cannot be read"),
        (_broken_confirmed, "broken", "confirmed.json is not what confirm writes"),
    ],
    ids=["empty", "others", "foreign config", "broken config", "broken study", "foreign study", "broken confirmed"],
)  # fmt: skip
def test_a_folder_without_a_readable_run_gives_a_sentence(tmp_path: Path, spoil, state: str, word: str) -> None:
    spoil(tmp_path)
    told = answer(RunFiles(tmp_path), "api/run")
    assert told["state"] == state
    assert word in told["sentence"]
    assert told["sentence"].endswith(".")
    assert "\n" not in told["sentence"]
