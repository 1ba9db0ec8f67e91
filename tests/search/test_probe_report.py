"""What a probe is told as, in words and as a picture, of a made-up table of two windows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from blocktune.search.config import Config
from blocktune.search.probe_report import draw, summary
from blocktune.search.run_directory import RunDirectory
from PIL import Image

WINDOWS = ("0-0.5", "0.5-1")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Louder text helps early as much as it harms late, by the most at block 2."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(Config().model_dump(mode="json")))
    rows = [
        {"block": b, "effect": effect, "window": window, "kind": kind, "delta": sign * b / 10,
         "low": sign * b / 10 - 0.05, "high": sign * b / 10 + 0.05, "n": 4}
        for window, sign in zip(WINDOWS, (1, -1), strict=True)
        for effect in ("remove", "enhance value") for kind in ("all", "colors") for b in range(3)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "probe.parquet")
    return RunDirectory(tmp_path)


def _size_and_colors(path: Path) -> tuple[int, int, int]:
    """Its height, and how many pixels are clearly blue and clearly red."""
    with Image.open(path) as picture:
        red, _, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=int)[:, : int(0.8 * picture.width)], 2, 0)
        return picture.height, int((blue - red > 60).sum()), int((red - blue > 60).sum())


def test_each_window_has_its_own_numbers(run: RunDirectory) -> None:
    told = summary(run).splitlines()
    assert told[1] == (
        "remove 0-0.5           blocks 2 +20.0 [+15.0, +25.0], 1 +10.0 [+5.0, +15.0], 0 +0.0 [-5.0, +5.0]"
    )
    assert told[2] == (
        "remove 0.5-1           blocks 0 +0.0 [-5.0, +5.0], 1 -10.0 [-15.0, -5.0], 2 -20.0 [-25.0, -15.0]"
    )
    assert [line.split("blocks")[0].strip() for line in told[1:]] == [
        f"{effect} {window}" for effect in ("remove", "enhance value") for window in WINDOWS
    ]


def test_a_window_that_is_the_whole_run_needs_no_name(run: RunDirectory) -> None:
    table = pd.read_parquet(run.path / "probe.parquet")
    table[table["window"] == "0-0.5"].assign(window="0-1").to_parquet(run.path / "probe.parquet")
    assert [line.split("blocks")[0].strip() for line in summary(run).splitlines()[1:]] == ["remove", "enhance value"]


def test_what_has_no_interval_is_told_without(run: RunDirectory) -> None:
    table = pd.read_parquet(run.path / "probe.parquet")
    table.assign(low=np.nan, high=np.nan).to_parquet(run.path / "probe.parquet")
    assert summary(run).splitlines()[1].endswith("blocks 2 +20.0, 1 +10.0, 0 +0.0")


def test_windows_have_rows_of_their_own(run: RunDirectory) -> None:
    """The mean of both windows is nothing, so that whoever averages them draws neither blue nor red."""
    both, blue, red = _size_and_colors(draw(run))
    assert blue > 1000
    assert red == pytest.approx(blue, rel=0.3)
    table = pd.read_parquet(run.path / "probe.parquet")
    table[table["window"] == "0-0.5"].to_parquet(run.path / "probe.parquet")
    one, blue_alone, red = _size_and_colors(draw(run))
    assert one < both
    assert blue_alone > 1000
    assert red == 0


def test_chosen_blocks_are_told_beside_random_ones(run: RunDirectory) -> None:
    rows = [
        {"set": name, "effect": "remove", "window": "0-0.5", "blocks": blocks, "steps": steps, "delta": delta,
         "low": delta - 0.1, "high": delta + 0.1}
        for name, blocks, steps, delta in (
            ("chosen", [1], 20, -0.02), ("random 1", [0], 20, -0.1), ("random 2", [2], 20, 0.0),
            ("all", [0, 1, 2], 13, 0.01),
        )
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(run.path / "probe_sets.parquet")
    told = summary(run)
    assert "chosen             remove 0-0.5 at [1]: -2.0 [-12.0, +8.0]" in told
    assert "all                every block computed, at 13 steps: +1.0" in told
    assert "the chosen gain more than 1 of 2 random sets" in told
