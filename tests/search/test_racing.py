"""The race alone, on made-up scores, and in a real search that ends at one limit after the other."""

import json
import sqlite3
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from blocktune.search.front import Point, hypervolume
from blocktune.search.racing import Race, rounds
from hypothesis import given
from hypothesis import strategies as st

Field = tuple[np.ndarray, np.ndarray]  # differences (candidates, images, 2), latencies (candidates,)


def field(seed: int, candidates: int = 150, images: int = 96) -> Field:
    """Most candidates lose some points, the fast ones more; two pictures of five differ at all, by 25 points or so."""
    rng = np.random.default_rng(seed)
    latency = rng.uniform(0.45, 1.0, candidates)
    speed = -0.5 * (0.65 - latency).clip(0)[:, None]
    true = 0.01 + speed - rng.exponential(0.06, (candidates, 2))
    differs = rng.random((candidates, images, 1)) < 0.4
    return true[:, None] + differs * rng.normal(0, 0.25, (candidates, images, 2)), latency


def run(made: Field, first: int) -> tuple[float, list[int]]:
    """The share of pictures that a race draws, and who has all of them; the first five are known points."""
    differences, latency = made
    images = differences.shape[1]
    race, drawn, whole = Race(images, 1.0), 0, []
    for i, one in enumerate(differences):
        for seen in rounds(first if i >= 5 else images, images):
            drawn += seen
            if seen == images:
                race.finish(one, latency[i])
                whole.append(i)
            elif not race.goes_on(one[:seen], latency[i]):
                break
            drawn -= seen if seen < images else 0
    return drawn / differences.shape[0] / images, whole


def volume(made: Field, members: list[int]) -> float:
    means = made[0].mean(axis=1)
    return hypervolume([Point("", *means[i], made[1][i]) for i in members], Point("", 0.0, 0.0, 1.0))


def test_a_race_reaches_what_all_pictures_reach_on_two_fifths_of_them() -> None:
    shares, reached, few = [], [], []
    for seed in range(8):
        made = field(seed)
        share, whole = run(made, 12)
        every = volume(made, list(range(len(made[0]))))
        shares.append(share)
        reached.append(volume(made, whole) / every)
        few.append(volume(made, list(range(round(share * len(made[0]))))) / every)
    assert np.mean(shares) < 0.4
    assert np.mean(reached) > 0.975
    assert np.mean(few) < 0.9  # the same pictures on fewer candidates


@given(st.integers(1, 500), st.integers(1, 500))
def test_rounds_double_and_end_with_all(first: int, images: int) -> None:
    counts = list(rounds(first, images))
    assert counts[-1] == images
    assert counts[0] == min(first, images)
    assert all(b == 2 * a for a, b in pairwise(counts[:-1]))
    assert counts == sorted(set(counts))


def test_who_may_still_add_to_the_front_goes_on() -> None:
    race, rng = Race(96, 1.0), np.random.default_rng(0)
    noise = rng.normal(0, 0.2, (96, 2))
    for latency in (1.0, 0.7, 0.5):
        race.finish(noise - noise.mean(axis=0), latency)
    assert not race.goes_on(noise[:12] - 0.3, 0.7)
    assert race.goes_on(noise[:12] + np.array([0.3, -0.05]), 0.7)  # better in one score alone
    assert race.goes_on(noise[:12], 0.3)  # faster than all
    assert race.goes_on(np.zeros((12, 2)), 0.7)  # equal so far says little
    assert race.goes_on(noise[:12] + 0.1, 1.0)  # better at no saving


def test_the_first_one_goes_on_without_warnings() -> None:
    assert Race(8, 1.0).goes_on(np.zeros((1, 2)), 0.9)


# One search: it ends at max_images, then at patience, then at its trials.

ANCHORS = 5


@pytest.fixture(scope="module")
def world(new_world: Callable[..., Any]) -> Any:
    world = new_world(trials=16)
    config = yaml.safe_load(world.config.read_text())
    config["prompts"] |= {"search": str(world.folder / "confirm.jsonl"), "search_images": 6}
    config["search"] |= {"first_images": 2, "max_images": 6 * ANCHORS + 8}
    world.config.write_text(yaml.safe_dump(config))
    world.pause = 0
    return world


@pytest.fixture(scope="module")
def run_directory(world: Any) -> Path:
    return world.folder / "run"


def trials_of(run: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="blocktune", storage=f"sqlite:///{run / 'study.db'}").get_trials()


@pytest.fixture(scope="module")
def stopped(world: Any, run_directory: Path) -> list[optuna.trial.FrozenTrial]:
    done = world.run("search", world.config, "--out", run_directory)
    assert "the search ends at search.max_images: " in done.stderr
    return trials_of(run_directory)


@pytest.fixture(scope="module")
def ended(world: Any, run_directory: Path, stopped: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    done = world.run("search", world.config, "--out", run_directory, "--resume", "--set", "search.max_images=null")
    assert "the search ends at search.trials: 16 are done" in done.stderr
    return trials_of(run_directory)


def test_a_limit_of_pictures_ends_a_search_that_more_of_them_resume(
    world: Any, run_directory: Path, stopped: list[optuna.trial.FrozenTrial], ended: list[optuna.trial.FrozenTrial]
) -> None:
    assert ANCHORS < len(stopped) < 16
    drawn = sum(t.user_attrs.get("images", 0) for t in stopped)
    assert 6 * ANCHORS + 8 <= drawn < 6 * ANCHORS + 8 + 6  # what ran was brought to its end
    assert [t.values for t in ended[: len(stopped)]] == [t.values for t in stopped]
    assert [t.state.name for t in ended] == ["COMPLETE"] * 16


def test_the_reason_of_the_end_is_told(world: Any, run_directory: Path, ended: list[optuna.trial.FrozenTrial]) -> None:
    assert "* ended by: search.trials: 16 are done" in (run_directory / "report.md").read_text()
    with sqlite3.connect(run_directory / "mlflow.db") as database:
        (told,) = database.execute("select value from tags where key = 'ended'").fetchall()
    assert told == ("search.trials: 16 are done",)
    again = world.run("search", "--resume", "--out", run_directory).stdout
    assert "it ended at search.trials: 16 are done" in again


def test_the_dropped_are_told_by_an_estimate_and_stand_nowhere(
    world: Any, run_directory: Path, ended: list[optuna.trial.FrozenTrial]
) -> None:
    before = pd.read_parquet(run_directory / "scores" / "unmodified.parquet")
    measured = [t for t in ended if "same_as" not in t.user_attrs]
    dropped = [t for t in measured if "dropped" in t.user_attrs]
    assert dropped
    for trial in measured:
        scores = pd.read_parquet(run_directory / "scores" / f"trial-{trial.number:04d}.parquet")
        seen = trial.user_attrs["images"]
        assert len(scores) == seen
        assert (seen in (2, 4)) == ("dropped" in trial.user_attrs)
        assert seen == 6 or "anchor" not in trial.user_attrs
        for value, name in zip(trial.values, ("lamp:Brightness", "crispness"), strict=False):
            assert value == pytest.approx(before[name].mean() + (scores[name] - before[name][:seen]).mean(), abs=1e-12)
    names = {f"trial {t.number}" for t in ended if "dropped" in t.user_attrs}
    confirmed = {c["name"] for c in json.loads((run_directory / "confirmed.json").read_text())["confirmed"]}
    front = {row["name"] for row in json.loads(world.run("front", run_directory, "--format", "json").stdout)}
    assert not names & (confirmed | front)
