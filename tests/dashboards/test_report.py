"""The page as one file, and the mistakes a person can make on the way to it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from blocktune.dashboards.report import LIMIT, write_report
from blocktune.search.run_directory import RunDirectory

from .conftest import HOSTILE, Page

MISTAKES: dict[str, tuple[list[str], str]] = {
    "dashboard of nothing": (["dashboard", "nowhere"], "nowhere is no folder"),
    "dashboard of a file": (["dashboard", "file"], "file is no folder"),
    "dashboard on no host": (["dashboard", "empty", "--host", "256.0.0.1", "--port", "0"], "cannot be listened on"),
    "report of nothing": (["report", "nowhere"], "nowhere is no folder"),
    "report of an empty folder": (["report", "empty"], "holds no run"),
    "report of a foreign folder": (["report", "foreign"], "config.yaml is of no search"),
}


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_directory_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[..., str],
    arguments: list[str],
    sentence: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("services: {}\n")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert sentence in mistake(*arguments)
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output is .*which cannot be written"):
        write_report(run.path, tmp_path / "missing" / "report.html")


@pytest.fixture(scope="module")
def text(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(run.path, path)
    assert path.stat().st_size <= LIMIT
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text("utf-8")


def test_it_needs_no_other_file_and_no_network(text: str) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`<]*", re.sub(r"base64,[\w+/=]+", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name of SVG, not a place that is asked
    assert not re.findall(r"<(?:link|script|img)[^>]*\b(?:href|src)=\"(?!data:)", text)


def test_it_carries_what_the_server_answers(text: str, page: Page) -> None:
    (carried,) = re.findall(r'<script type="application/json" id="answers">(.*?)</script>', text, re.DOTALL)
    answers = json.loads(carried)
    for address in ("api/run", "api/candidates/trial-1", "api/plans/trial-1", "api/candidates/trial-2"):
        assert answers[address] == page.json(f"/{address}")
    assert HOSTILE in answers["api/candidates/trial-1"]["pairs"]["prompt"]
    assert answers["policies/balanced.json"].startswith("data:application/json;base64,")
    assert sum(address.startswith("pictures/") for address in answers) == 16


def test_no_prompt_of_a_run_becomes_markup(text: str) -> None:
    assert "<script>document" not in text
    assert text.count("</script>") == 2
