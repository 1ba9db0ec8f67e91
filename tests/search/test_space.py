"""Whatever Optuna proposes is a policy that compiles, and equal behaviour has one key."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from blocktune.policies import Plan
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config, Generation, Space
from blocktune.search.space import NEVER, QUIET, anchors, bands, candidate, distributions, neighbours
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def model(tiny_sd3_pipeline: Callable[..., Any]) -> ModelIdentity:
    return ModelIdentity.of(tiny_sd3_pipeline(num_layers=12))


def of(distribution: optuna.distributions.BaseDistribution) -> st.SearchStrategy[Any]:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    return st.floats(distribution.low, distribution.high)


spaces = st.builds(
    Space, bands=st.integers(1, 20), skip=st.booleans(), steps=st.sampled_from([(14,), (20,), ()]),
    operands=st.sampled_from([("input",), ("key", "value", "logit"), ("input", "value")]),
)  # fmt: skip
configs = st.builds(lambda space: Config(space=space, generation=Generation(num_inference_steps=20)), spaces)
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
    assert {len(row) for row in kinds} == {12}
    skipped = {i for row in kinds for i, kind in enumerate(row) if kind == "skip"}
    assert skipped == ({values["skip"]} if values.get("skip_from", NEVER) < NEVER else set())
    if all(values[f"reuse_{i}"] == 1 for i in range(len(bands(config.space, 12)))):
        assert "reuse" not in {kind for row in kinds for kind in row}


@given(params)
def test_choices_without_effect_do_not_change_the_key(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]
) -> None:
    config, values = drawn
    count = len(bands(config.space, 12))
    silent = values | {f"reuse_{i}": 1 for i in range(count)} | {"skip_from": NEVER}
    plain = anchors(config, 12)["unmodified"] | {"steps": values.get("steps", 20)}
    for quiet in ({"operand": QUIET}, {f"scale_{i}": 1.0 for i in range(count)}):
        assert candidate(silent | quiet, config, model, "a").key == candidate(plain, config, model, "b").key


def test_other_steps_or_actions_change_the_key(model: ModelIdentity) -> None:
    config = Config()
    keys = [candidate(values, config, model, name).key for name, values in anchors(config, 12).items()]
    assert len(set(keys)) == len(keys)


@given(params)
def test_neighbours_differ_in_one_choice_by_one_notch(
    model: ModelIdentity, drawn: tuple[Config, dict[str, Any]]
) -> None:
    config, values = drawn
    near = neighbours(values, config, model)
    own = candidate(values, config, model, "x")
    assert own.key not in {n.key for n in near}
    assert len({n.key for n in near}) == len(near) <= 2 * len(values)
    for one in near:
        name, value = one.policy.name.split(" ")
        told = type(values[name])(value)
        if name.startswith("scale_"):
            assert abs(np.log(told / values[name])) <= 0.1 * np.log(1.8) + 1e-9
        else:
            choices = list(distributions(config, 12)[name].choices)
            assert abs(choices.index(told) - choices.index(values[name])) == 1


@given(configs)
def test_anchors_lie_in_the_space_but_for_their_steps(config: Config) -> None:
    choices = distributions(config, 12)
    points = anchors(config, 12)
    assert [values["steps"] for values in points.values()] == [20, 12, 8, 20, 20, 20]
    for values in points.values():
        assert choices.keys() <= values.keys() <= choices.keys() | {"steps"}
        for name in choices.keys() - {"steps"}:
            assert choices[name]._contains(choices[name].to_internal_repr(values[name])), name


@given(st.integers(1, 40), st.integers(1, 60))
def test_bands_share_out_all_blocks(count: int, blocks: int) -> None:
    made = bands(Space(bands=count), blocks)
    assert [block for band in made for block in band] == list(range(blocks))
    assert max(map(len, made)) - min(map(len, made)) <= 1
