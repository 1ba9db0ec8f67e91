"""The search of the benchmarks races as the product's does, and spends what it is allowed."""

from itertools import islice

import numpy as np
import pytest
import torch
from blocktune.evaluators import get
from blocktune.search.config import Config, Search
from blocktune.search.prior import prior
from blocktune.search.racing import rounds
from blocktune.search.space import anchors, steps_of

from benchmarks.searching import proposals, searched
from benchmarks.workbench import Way, Workbench

PICTURES = 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.manual_seed(0)
    generation = {"num_inference_steps": 4, "batch": 8}
    prompts = {"search_images": PICTURES, "confirm_images": 2}
    space = {"steps": [3, 2], "anchor_steps": [3]}
    config = Config.model_validate({"generation": generation, "prompts": prompts, "space": space})
    return Workbench(config, tmp_path_factory.mktemp("bench"), "cpu", ["shapes_binary"])


def test_candidates_race_and_known_points_do_not(bench):
    told = list(islice(proposals(bench, Search(sampler="random"), PICTURES, first=2), 30))
    known = [p for p in anchors(bench.config, bench.model.num_blocks).values() if p["steps"] in steps_of(bench.config)]
    known += prior(bench.config, bench.model).values()
    assert all(len(p.gains) == PICTURES for p in told[: len(known)])
    assert {len(p.gains) for p in told} <= set(rounds(2, PICTURES))
    assert any(len(p.gains) < PICTURES for p in told)
    plain = Way("unmodified", "unmodified", bench.steps)
    before = bench.matrix(plain, "search", PICTURES)
    for p in told:
        assert np.array_equal(bench.matrix(p.way, "search", len(p.gains)) - before[: len(p.gains)], p.gains)
        estimate = before.mean(axis=0) + p.gains.mean(axis=0)
        assert [p.point.alignment, p.point.quality] == pytest.approx(estimate.tolist())


def test_scores_that_came_in_parts_are_those_of_the_pictures(bench):
    p = next(
        p
        for p in islice(proposals(bench, Search(sampler="random"), PICTURES, first=2), 12)
        if len(p.gains) > 2 and p.way.policy
    )
    texts = [prompt.text for prompt in bench.prompts["search"][: len(p.gains)]]
    images = bench.pictures(p.way, "search", len(p.gains))
    whole = get("shapes_binary").score(images, texts)
    assert np.array_equal(bench.scores(p.way, "search", len(p.gains))["shapes_binary"], whole)


def test_a_search_ends_with_its_budget(bench):
    ways = searched(bench, Search(), budget=60, pictures=PICTURES, first=2, count=3)
    assert 0 < len(ways) <= 3
    assert all(len(bench.scores(way, "search", PICTURES)["shapes"]) == PICTURES for way in ways)
