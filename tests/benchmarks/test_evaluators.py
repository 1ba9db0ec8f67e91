"""Scores are timed in processes of their own, and the table adds up those of the example."""

import json
import sys
from typing import Any

import pytest

from benchmarks import evaluators


def test_the_tiny_road(tmp_path, monkeypatch):
    def run(*arguments: str) -> dict[str, Any]:
        call = ["evaluators", "--size", "tiny", "--seconds", "0.1", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", call)
        evaluators.main()
        return json.loads((tmp_path / "evaluators.json").read_text())

    first = run("sane")
    told = run("psnr")  # later, beside what is there
    assert [row["score"] for row in told["results"]] == ["psnr", "sane"]
    assert told["results"][1] == first["results"][0]
    assert told["generation_s"] == first["generation_s"]
    assert all(4 <= row["pictures"] <= 6 for row in told["results"])
    for row in told["results"]:
        assert row["images_per_s"] * row["share"] * told["generation_s"] == pytest.approx(1)
        assert row["memory_gib"] > 0
    last = (tmp_path / "evaluators.md").read_text().splitlines()[-1]
    total = sum(row["share"] for row in told["results"])
    assert last.startswith(f"2 of the 5 scores of sd3.5-large: {total:.2%} of generation, at most 10%: ")


@pytest.mark.parametrize(
    ("shares", "end"), [((0.02, 0.03), "5.00%: held"), ((0.02,), "2.00%: open"), ((0.2,), "MISSED")]
)
def test_the_bar_is_held_by_all_scores_alone(shares, end):
    rows = [{"score": name, "share": share} for name, share in zip("ab", shares, strict=False)]
    told = evaluators.verdict([*rows, {"score": "c", "share": 9.0}], ["a", "b"])
    assert told.replace(" of generation, at most 10%", "").endswith(end)


def test_rows_of_another_device_are_not_mixed(tmp_path):
    setup = {"device": "one", "size": "full"}
    assert evaluators.known(tmp_path / "none.json", setup) == setup | {"results": []}
    (tmp_path / "other.json").write_text(json.dumps({"device": "another", "size": "full", "results": []}))
    with pytest.raises(ValueError, match="has device 'another', here 'one'; accepted: another --out, or --anew"):
        evaluators.known(tmp_path / "other.json", setup)
