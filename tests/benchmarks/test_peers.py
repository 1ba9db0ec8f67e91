"""Caches of peers act on the bundled model, and leave it as it was."""

import numpy as np
import pytest
import torch
from blocktune.policies import Plan
from blocktune.search.config import Config

from benchmarks.peers.caches import ways
from benchmarks.peers.searches import evolved, step_mask
from benchmarks.workbench import Way, Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.manual_seed(0)
    generation = {"num_inference_steps": 8, "batch": 2}
    prompts = {"search_images": 2, "confirm_images": 2}
    config = Config.model_validate({"generation": generation, "prompts": prompts})
    return Workbench(config, tmp_path_factory.mktemp("bench"), "cpu")


def test_every_cache_acts_and_leaves_the_model_as_it_was(bench):
    plain = Way("unmodified", "", bench.steps)
    before = bench.pictures(plain, "confirm", 2)
    last_of = {way.method: way for way in ways(bench)}  # the boldest setting of each
    assert {"first-block cache", "TaylorSeer", "MagCache"} <= set(last_of)
    for way in last_of.values():
        first, again = (bench.pictures(way, "confirm", 2) for _ in range(2))
        assert not np.array_equal(first, before), way
        assert np.array_equal(first, again), f"{way} remembers its last run"
        bench._prefixes["confirm"].outputs.plain.clear()
        assert np.array_equal(bench.pictures(plain, "confirm", 2), before), way


def test_a_step_mask_computes_as_many_steps_as_asked(bench):
    way = step_mask(bench, 3, rounds=3, pictures=1)
    kinds = Plan.compile(way.policy, bench.steps).kinds
    assert [set(row) for row in kinds].count({"compute"}) == 3
    assert step_mask(bench, 3, rounds=3, pictures=1) == way  # kept in the folder


def test_evolution_keeps_what_nothing_beats(bench):
    front = evolved(bench, candidates=6, pictures=2, population=4)
    seconds = [bench.costs().predict_policy(way.policy, bench.steps) for way in front]
    alignment = [bench.scores(way, "search", 2)["shapes"].mean() for way in front]
    assert seconds == sorted(seconds)
    assert alignment == sorted(alignment)
