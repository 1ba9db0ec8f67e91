"""The race alone, on made-up scores."""

from itertools import pairwise

import numpy as np
from blocktune.search.front import Baseline, Point, hypervolume
from blocktune.search.racing import Race, rounds
from hypothesis import given
from hypothesis import strategies as st

Field = tuple[np.ndarray, np.ndarray]  # differences (candidates, images, 2), latencies (candidates,)


def field(seed: int, candidates: int = 150, images: int = 384) -> Field:
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
    return hypervolume(
        [Point("", *means[i], made[1][i]) for i in members], Baseline("", 0.0, 0.0, 1.0, scales=(1.0, 1.0))
    )


def test_a_race_reaches_what_all_pictures_reach_on_a_third_of_them() -> None:
    shares, reached, few = [], [], []
    for seed in range(6):
        made = field(seed)
        share, whole = run(made, 12)
        every = volume(made, list(range(len(made[0]))))
        shares.append(share)
        reached.append(volume(made, whole) / every)
        few.append(volume(made, list(range(round(share * len(made[0]))))) / every)
    assert np.mean(shares) < 1 / 3
    assert np.mean(reached) > 0.975
    assert np.mean(few) < 0.9  # the same pictures on fewer candidates


@given(st.integers(1, 500), st.integers(1, 500))
def test_rounds_grow_by_half_and_end_with_all(first: int, images: int) -> None:
    counts = list(rounds(first, images))
    assert counts[-1] == images
    assert counts[0] == min(first, images)
    assert all(2 * b in (3 * a, 3 * a + 1) for a, b in pairwise(counts[:-1]))
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
