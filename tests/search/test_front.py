"""Fronts and volumes against brute force, and picks worked by hand."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from blocktune.evaluators import Interval, get, paired_interval
from blocktune.search.front import (
    Baseline,
    Confirmed,
    Point,
    chance_to_hold,
    hypervolume,
    is_fidelity,
    non_dominated,
    pick,
    shortlist,
    spread,
)
from hypothesis import given
from hypothesis import strategies as st

MARGINS = (0.015, 0.02)  # of alignment, of quality

BASE = Baseline("unmodified", 0.5, 0.5, 1.0, key="base", scales=(1.0, 1.0))
grid = st.integers(0, 4)
points = st.lists(st.tuples(grid, grid, grid), max_size=8).map(
    lambda rows: [Point(f"p{i}", 0.4 + a / 20, 0.4 + q / 20, 0.2 + t / 5, f"k{i}") for i, (a, q, t) in enumerate(rows)]
)


def beats(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a.losses, b.losses, strict=True)) and a.losses != b.losses


@given(points)
def test_the_front_is_what_nothing_beats(candidates: list[Point]) -> None:
    front = non_dominated(candidates)
    assert {p.losses for p in front} == {p.losses for p in candidates if not any(beats(q, p) for q in candidates)}
    assert len({p.losses for p in front}) == len(front)
    assert [p.latency for p in front] == sorted(p.latency for p in front)


@given(points)
def test_hypervolume_is_the_union_of_boxes(candidates: list[Point]) -> None:
    """Counted in the cells of the grid that the points lie on: 1/20 x 1/20 x 1/5 each."""
    cells = {
        (a, q, t)
        for p in candidates
        for a in range(round((p.alignment - 0.4) * 20))
        for q in range(round((p.quality - 0.4) * 20))
        for t in range(round((p.latency - 0.2) * 5), 4)
    }
    assert hypervolume(candidates, BASE) == pytest.approx(100 * len(cells) / (20 * 20 * 5), abs=1e-9)


@given(points, st.sampled_from([0.15, 7.0, 40.0]), st.sampled_from([0.15, 7.0, 40.0]))
def test_scores_on_other_scales_command_the_same(candidates: list[Point], alignment: float, quality: float) -> None:
    def wide(p: Point) -> Point:
        return replace(p, alignment=alignment * p.alignment, quality=quality * p.quality)

    base = Baseline("unmodified", 0.5 * alignment, 0.5 * quality, 1.0, key="base", scales=(alignment, quality))
    assert hypervolume([wide(p) for p in candidates], base) == pytest.approx(hypervolume(candidates, BASE), abs=1e-9)
    for p in candidates:
        assert base.points(wide(p)) == pytest.approx((100 * p.alignment - 50, 100 * p.quality - 50))


@given(points, st.integers(1, 4))
def test_spread_chooses_members_of_the_front(candidates: list[Point], count: int) -> None:
    front = non_dominated(candidates)
    chosen = spread(front, BASE, count)
    assert len(chosen) == min(count, len(front))
    assert len({p.key for p in chosen}) == len(chosen)
    assert all(p in front for p in chosen)


@given(points, st.integers(0, 6), st.randoms(use_true_random=False))
def test_a_shortlist_has_the_fastest_that_are_sure_and_those_of_the_front(
    candidates: list[Point], count: int, random: Random
) -> None:
    chances = {p.key: random.choice([0.0, 0.2, 0.6, 1.0]) for p in candidates}
    chosen = shortlist(candidates, BASE, count, chances)
    assert len({p.key for p in chosen}) == len(chosen) <= count
    assert len(chosen) >= min(count, len([p for p in non_dominated([BASE, *candidates]) if p is not BASE]))
    assert [p.latency for p in chosen] == sorted(p.latency for p in chosen)
    for chance in (0.5, 1.0)[2 - min(count, 3) // 2 :] if count else ():
        able = [p.latency for p in candidates if chances[p.key] >= chance and p.latency < BASE.latency]
        assert not able or min(able) in [p.latency for p in chosen]


def test_a_shortlist_goes_from_what_is_sure_to_an_even_chance() -> None:
    anchor = Point("late reuse", 0.5, 0.5, 0.5, key="anchor", anchor=True)
    names = ("gamble", "even", "likely", "sure", "slow")
    candidates = [Point(n, 0.49, 0.49, t, key=n) for n, t in zip(names, (0.1, 0.2, 0.3, 0.4, 0.6), strict=True)]
    chances = dict(zip(("anchor", *names), (1.0, 0.1, 0.55, 0.8, 0.99, 1.0), strict=True))

    def chosen(count: int, without: str = "") -> list[str]:
        return [p.name for p in shortlist([c for c in candidates if c.name != without], BASE, count, chances, [anchor])]

    assert chosen(1) == ["sure"]
    assert chosen(3) == ["gamble", "even", "sure"]  # the half that may hold, and what commands most
    assert chosen(5) == ["gamble", "even", "likely", "sure"]  # nothing needs what is slower than an anchor
    assert chosen(1, without="sure") == ["gamble"]  # the anchor is the fastest that is sure


def test_the_chance_to_hold_is_that_of_a_simulation() -> None:
    """Normal differences, a picture a prompt: search on 96, confirm on 576, one of ten compared."""
    rng, margins = np.random.default_rng(0), (0.015, 10.0)
    texts = [str(i) for i in range(96)]
    told, held = [], []
    for true in np.repeat([-0.01, 0.0, 0.005], 300):
        found = rng.normal(true, 0.08, 96)
        chance = chance_to_hold(np.stack([found, found], 1), texts, 576, 10, margins)
        told.append(chance)
        # a flat prior: what is true lies about what was found as that lies about what is true
        drawn = rng.normal(rng.normal(found.mean(), found.std(ddof=1) / 96**0.5), 0.08, 576)
        held.append(paired_interval(drawn, np.zeros(576), level=0.995).low >= -0.015)
    assert np.mean(told) == pytest.approx(np.mean(held), abs=0.04)
    assert np.mean(np.array(held)[np.array(told) > 0.7]) > 0.65


def test_no_difference_is_sure_to_hold_and_a_large_one_not() -> None:
    texts = ["a", "b", "a", "b"]
    assert chance_to_hold(np.zeros((4, 2)), texts, 100, 5, (0.01, 0.01)) == 1.0
    assert chance_to_hold(np.full((4, 2), [0.0, -0.02]), texts, 100, 5, (0.01, 0.01)) == 0.0


def member(
    name: str,
    speedup: float,
    delta: float,
    half: float = 0.005,
    quality: float = 0.0,
    rules: int = 1,
    anchor: bool = False,
) -> Confirmed:
    alignment = Interval(
        value=0.5 + delta, baseline=0.5, delta=delta, low=delta - half, high=delta + half, n=100, level=0.95
    )
    crispness = Interval(
        value=0.5 + quality, baseline=0.5, delta=quality, low=quality - half, high=quality + half, n=100, level=0.95
    )
    return Confirmed(name, name, 20, anchor, rules, alignment, crispness, {}, 1 / speedup, speedup, speedup)


def test_nothing_is_picked_where_nothing_held() -> None:
    assert pick([], *MARGINS) == {}
    assert pick([member("worse", 2.0, -0.05), member("blurred", 2.0, 0.05, quality=-0.03)], *MARGINS) == {}
    assert pick([member("unsure", 2.0, 0.0, half=0.02)], *MARGINS) == {}


def test_nothing_is_picked_where_fewer_steps_are_as_good() -> None:
    steps = member("14 steps", 1.5, 0.01, rules=0, anchor=True)
    assert pick([steps, member("slow", 1.4, 0.0)], *MARGINS) == {}
    assert pick([steps], *MARGINS) == {}
    assert set(pick([steps, member("faster", 1.6, 0.0)], *MARGINS)) == {"balanced", "fast"}


def test_nothing_is_picked_that_another_guidance_does_as_well() -> None:
    found = member("trial 9", 1.0, 0.03, rules=0)  # of no anchor: at fewer steps and another guidance, say
    for plain in (member("guidance 8", 1.0, 0.03, rules=0, anchor=True), found):
        assert pick([plain, member("louder", 0.99, 0.02)], *MARGINS) == {}
        assert set(pick([plain, member("louder", 0.99, 0.05)], *MARGINS)) == {"quality"}


def test_an_anchor_with_rules_may_itself_be_picked() -> None:
    assert pick([member("late reuse 3", 1.4, 0.0, anchor=True)], *MARGINS)["fast"].name == "late reuse 3"


def test_each_pick_is_the_best_at_what_it_is_called() -> None:
    louder, middle, quick = member("louder", 0.95, 0.10), member("middle", 1.4, 0.06), member("quick", 1.8, -0.005)
    assert pick([quick, middle, louder], *MARGINS) == {"quality": louder, "balanced": middle, "fast": quick}


def test_a_slower_candidate_is_never_fast_or_balanced() -> None:
    assert set(pick([member("louder", 0.9, 0.1)], *MARGINS)) == {"quality"}


def test_a_wider_score_makes_the_same_picks() -> None:
    def wide(c: Confirmed) -> Confirmed:
        told = {k: 40 * getattr(c.alignment, k) for k in ("value", "baseline", "delta", "low", "high")}
        return replace(c, alignment=replace(c.alignment, **told, scale=40.0))

    all_ = [member("louder", 0.95, 0.10), member("middle", 1.4, 0.06), member("quick", 1.8, -0.005)]
    told = {name: one.name for name, one in pick([wide(c) for c in all_], *MARGINS).items()}
    assert told == {"quality": "louder", "balanced": "middle", "fast": "quick"}


@pytest.mark.parametrize(
    "name", ["psnr", "ssim", "lpips:alex", "dinov2", "shapes", "clip_score:reference", "crispness"]
)
def test_what_needs_the_unmodified_picture_is_fidelity(name: str) -> None:
    assert is_fidelity(name) == get(name).needs_reference


def test_confirmed_goes_through_json_unchanged() -> None:
    one = member("middle", 1.4, 0.06)
    assert Confirmed.from_dict(one.to_dict()) == one
    assert "guidance_scale" not in one.to_dict()
    told = {"shapes": 0.01, "shapes_binary": 1.0}
    other = replace(one, guidance_scale=4.5, bootstrap=one.alignment, p_values=told, cmmd=0.5, fid=7.5)
    assert Confirmed.from_dict(other.to_dict()) == other
    later = (
        "bootstrap",
        "p_values",
        "cmmd",
        "fid",
        "transformer_seconds",
        "transformer_speedup",
    )  # what files of before do not have
    assert Confirmed.from_dict({k: v for k, v in one.to_dict().items() if k not in later}) == one
