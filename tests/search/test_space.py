"""Whatever Optuna proposes is a policy that compiles, and equal behaviour has one key."""

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import optuna
import pytest
from blocktune.policies import Plan, Reuse, ScaleText
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config, Generation, Space
from blocktune.search.front import short
from blocktune.search.space import NEVER, QUIET, Around, anchors, bands, candidate, distributions, neighbours
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def model(tiny_sd3_pipeline: Callable[..., Any]) -> ModelIdentity:
    return ModelIdentity.of(tiny_sd3_pipeline(num_layers=12))


def of(distribution: optuna.distributions.BaseDistribution) -> st.SearchStrategy[Any]:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    return st.floats(distribution.low, distribution.high)


OWN = 6.0  # guidance
OPTIONAL = {"steps", "guidance_scale", "guidance_until", "compute_until", "forecast"}
spaces = st.builds(
    Space, bands=st.integers(1, 20), skip=st.booleans(), steps=st.sampled_from([(14,), (20,), ()]),
    guidance_scale=st.sampled_from([(), (4.0, 8.5), (6.0,), (8.5, 6.0, 4.0, 4.0)]),
    guidance_until=st.sampled_from([(), (0.4,), (0.6, 0.3, 0.3)]),
    compute_until=st.sampled_from([(), (0.1, 0.9), (0.8, 0.45, 0.45)]), forecast=st.booleans(),
    operands=st.sampled_from([("input",), ("key", "value", "logit"), ("input", "value")]),
    text_windows=st.sampled_from([((0.0, 1.0),), ((0.0, 0.15), (0.1, 0.95), (0.3, 0.35))]),
)  # fmt: skip
configs = st.builds(
    lambda space: Config(space=space, generation=Generation(num_inference_steps=20, guidance_scale=OWN)), spaces
)
params = configs.flatmap(
    lambda config: st.tuples(
        st.just(config), st.fixed_dictionaries({k: of(d) for k, d in distributions(config, 12).items()})
    )
)


@given(params)
def test_every_proposal_is_a_policy_that_plans(model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]) -> None:
    config, values = drawn
    chosen = candidate(values, config, model, "x")
    kinds = Plan.compile(chosen.policy, chosen.steps).kinds
    assert len(kinds) == chosen.steps == values.get("steps", 20)
    assert chosen.policy.guidance_window == (0.0, values.get("guidance_until", 1.0))
    guidance = values.get("guidance_scale", OWN)
    assert chosen.guidance_scale == (None if guidance == OWN else guidance)
    assert {len(row) for row in kinds} == {12}
    skipped = {i for row in kinds for i, kind in enumerate(row) if kind == "skip"}
    assert skipped == ({values["skip"]} if values.get("skip_from", NEVER) < NEVER else set())
    louder = {rule.window for rule in chosen.policy.rules if isinstance(rule.action, ScaleText)}
    assert louder <= {tuple(map(float, values["text_window"].split("-")))}
    last = max(values["reuse_from"], values.get("compute_until", 1.0))
    for i, blocks in enumerate(bands(config.space, 12)):
        acting = [b for b in blocks if b not in skipped]
        if values[f"reuse_{i}"] == 1:
            assert "reuse" not in {row[b] for row in kinds for b in acting}
        else:
            assert {row[b] for row in kinds[ceil(last * chosen.steps) :] for b in acting} <= {"reuse"}
    for rule in chosen.policy.rules:
        if isinstance(rule.action, Reuse):
            ended = not config.space.guidance_until or rule.window[0] >= values["guidance_until"]
            assert rule.action.forecast == ("linear" if values.get("forecast") and ended else None)


@given(params)
def test_choices_without_effect_do_not_change_the_key(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]
) -> None:
    config, values = drawn
    count = len(bands(config.space, 12))
    silent = values | {f"reuse_{i}": 1 for i in range(count)} | {"skip_from": NEVER}  # no reuse, so no forecast either
    plain = anchors(config, 12)["unmodified"] | {"steps": values.get("steps", 20)}
    plain |= {"guidance_scale": values.get("guidance_scale", OWN)}
    plain |= {"guidance_until": values.get("guidance_until", 1.0)}
    for quiet in ({"operand": QUIET}, {f"scale_{i}": 1.0 for i in range(count)}):
        assert candidate(silent | quiet, config, model, "a").key == candidate(plain, config, model, "b").key


@given(params)
def test_the_key_is_that_of_policy_and_steps_unless_guidance_differs(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]
) -> None:
    """Studies of before there was a choice of guidance know candidates by it."""
    config, values = drawn
    chosen = candidate(values, config, model, "x")
    before = f"{chosen.policy.digest}-{chosen.steps}"
    own = candidate(values | {"guidance_scale": OWN}, config, model, "x")
    assert (own.key, own.sampling) == (before, {"num_inference_steps": chosen.steps})
    assert (chosen.key == before) == (values.get("guidance_scale", OWN) == OWN)
    assert chosen.key.startswith(before)


@given(params, params)
def test_two_behave_alike_where_every_block_does_the_same_at_every_step(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]], other: tuple[Config, dict[str, Any]]
) -> None:
    one, two = (candidate(values, config, model, "x") for config, values in (drawn, other))
    plans = [Plan.compile(chosen.policy, chosen.steps) for chosen in (one, two)]
    alike = plans[0] == plans[1] and one.guidance_scale == two.guidance_scale
    assert (one.behaviour == two.behaviour) == alike
    assert one.behaviour == two.behaviour or one.key != two.key


@pytest.mark.parametrize(
    ("steps", "alike"),
    [(4, True), (20, False)],  # from 0.4 on four steps have two left, twenty have twelve
)
def test_few_steps_make_policies_alike(model: ModelIdentity, steps: int, alike: bool) -> None:
    config = Config(generation=Generation(num_inference_steps=steps))
    points = anchors(config, 12)
    often, seldom = (candidate(points[f"late reuse {every}"], config, model, "x") for every in (4, 6))
    assert often.key != seldom.key
    assert (often.behaviour == seldom.behaviour) == alike


def test_other_steps_guidance_or_actions_change_the_key(model: ModelIdentity) -> None:
    config = Config(space=Space(guidance_scale=(4.0, 4.5, 8.0)))
    keys = [candidate(values, config, model, name).key for name, values in anchors(config, 12).items()]
    assert len(set(keys)) == len(keys)
    assert len({short(key) for key in keys}) == len(keys)  # and so do files


def test_guidance_is_an_anchor_each_and_a_choice_from_low_to_high() -> None:
    config = Config(space=Space(guidance_scale=(8.0, 4.5, 6.0)))
    points = anchors(config, 12)
    assert list(points)[:5] == ["unmodified", "12 steps", "8 steps", "guidance 4.5", "guidance 8"]
    for name, scale in (("guidance 4.5", 4.5), ("guidance 8", 8.0)):
        assert points[name] == points["unmodified"] | {"guidance_scale": scale}
    assert distributions(config, 12)["guidance_scale"].choices == (4.5, 6.0, 8.0)
    assert "guidance_scale" not in distributions(Config(), 12)


@given(params)
def test_neighbours_differ_in_one_choice_by_one_notch(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]
) -> None:
    config, values = drawn
    near = neighbours(values, config, model)
    own = candidate(values, config, model, "x")
    assert own.behaviour not in {n.behaviour for n in near}
    assert len({n.key for n in near}) == len({n.behaviour for n in near}) == len(near) <= 2 * len(values)
    for one in near:
        name, value = one.policy.name.split(" ")
        told = value == "True" if name == "forecast" else type(values[name])(value)
        if name.startswith("scale_"):
            assert abs(np.log(told / values[name])) <= 0.1 * np.log(1.8) + 1e-9
        else:
            choices = list(distributions(config, 12)[name].choices)
            assert abs(choices.index(told) - choices.index(values[name])) == 1


@settings(max_examples=20)
@given(params, st.integers(0, 3))
def test_near_is_an_unknown_neighbour(model: ModelIdentity, drawn: tuple[Config, dict[str, Any]], seed: int) -> None:
    config, values = drawn
    around = {one.behaviour for one in neighbours(values, config, model)}
    rng, known, near = np.random.default_rng(seed), set[str](), Around(config, model).near
    for _ in range(min(3, len(around))):
        chosen = near([values], known, rng)
        assert chosen is not None
        found = candidate(chosen, config, model, "x").behaviour
        assert found in around - known
        known.add(found)
    assert near([values], around, rng) is None
    assert near([], set(), rng) is None
    if around - known:
        assert near([values] * 3, known, rng) is not None, "whichever is asked first"


@given(configs)
def test_anchors_lie_in_the_space_but_for_their_steps(config: Config) -> None:
    choices = distributions(config, 12)
    points = anchors(config, 12)
    guided = sorted({*config.space.guidance_scale} - {OWN})
    ends = sorted({*config.space.guidance_until})
    shorter = [ends[len(ends) // 2]] if ends else []
    assert [values["steps"] for values in points.values()] == [20, 12, 8] + [20] * (len(guided) + len(shorter) + 3)
    assert [values["guidance_scale"] for values in points.values()] == [OWN] * 3 + guided + [OWN] * (len(shorter) + 3)
    assert [v["guidance_until"] for v in points.values()] == [1.0] * (3 + len(guided)) + shorter + [1.0] * 3
    for values in points.values():
        assert choices.keys() <= values.keys() <= choices.keys() | OPTIONAL
        for name in choices.keys() - {"steps"}:
            assert choices[name]._contains(choices[name].to_internal_repr(values[name])), name


@given(st.integers(1, 40), st.integers(1, 60))
def test_bands_share_out_all_blocks(count: int, blocks: int) -> None:
    made = bands(Space(bands=count), blocks)
    assert [block for band in made for block in band] == list(range(blocks))
    assert max(map(len, made)) - min(map(len, made)) <= 1
