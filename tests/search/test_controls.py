"""Random sets of equal size, and all blocks at the budget of the chosen ones, for each effect of which they tell."""

import numpy as np
import pytest
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config
from blocktune.search.config import Probe as ProbeConfig
from blocktune.search.controls import NO_OP, count, sets, uncontrolled
from blocktune.search.part import EFFECTS, Part

BLOCKS, WHOLE = 12, (0.0, 1.0)
MODEL = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=BLOCKS, fingerprint="0" * 64)


def gains(*best: int) -> list[np.ndarray]:
    """By block, of which these gain by far the most."""
    return [np.array([0.0, 0.01]) + (block in best) for block in range(BLOCKS)]


def found(effect: str, *best: int) -> dict[str, Part]:
    return dict(sets(Config(probe=ProbeConfig(effects=(effect,))), MODEL, {(effect, WHOLE): gains(*best)}, 24))


@pytest.mark.parametrize(
    "effect", ["remove", "reuse", "disable locally", "enhance key", "enhance value", "enhance logit"]
)
def test_an_effect_alone_has_its_controls(effect: str) -> None:
    told = found(effect, 2, 7, 9)
    assert [*told] == ["chosen", *(f"random {i + 1}" for i in range(8)), "all", NO_OP]
    assert told["chosen"] == Part(effect, (2, 7, 9), WHOLE, 24, "confirm")
    assert all(len({*told[f"random {i + 1}"].blocks}) == 3 for i in range(8))
    assert len({told[f"random {i + 1}"].blocks for i in range(8)}) > 4
    assert count(ProbeConfig(effects=(effect,)), 24) == 24 * len(told)


def test_all_blocks_have_the_budget_of_the_chosen() -> None:
    """The product of scales, the silence and the spared calls of blocks are those of three of twelve blocks."""
    assert found("remove", 1, 2, 3)["all"].steps == 15  # of 20: a quarter of the calls is spared
    assert found("reuse", 1, 2, 3)["all"].steps == 18  # an eighth is two steps and a half
    louder, deaf = found("enhance value", 1, 2, 3)["all"], found("disable locally", 1, 2, 3)["all"]
    assert louder.scale == pytest.approx(1.5 ** (3 / BLOCKS))
    assert deaf.scale == pytest.approx(1 - 3 / BLOCKS)
    assert louder.blocks == deaf.blocks == tuple(range(BLOCKS))
    (rule,) = deaf.policy(MODEL, 1.5).rules
    assert rule.action.model_dump(include={"operand", "scale"}) == {"operand": "logit", "scale": 0.75}
    fewer = found("remove", 1, 2, 3)["all"]
    assert fewer.policy(MODEL, 1.5).rules == ()
    assert fewer.file(MODEL, 1.5) != found("reuse", 1, 2, 3)["all"].file(MODEL, 1.5)


def test_the_most_helpful_louder_text_in_its_best_window_is_controlled() -> None:
    late = (0.5, 1.0)
    known = {
        ("enhance key", WHOLE): gains(1, 2), ("enhance value", WHOLE): gains(1),
        ("enhance value", late): gains(3, 4, 5), ("enhance input", WHOLE): gains(0, 1, 2),
        ("remove", WHOLE): gains(8),
    }  # fmt: skip
    told = sets(Config(), MODEL, known, 24)
    chosen = [part for name, part in told if name == "chosen"]
    assert [(part.effect, part.window) for part in chosen] == [("remove", WHOLE), ("enhance value", late)]
    assert chosen[1].blocks == (3, 4, 5)
    assert {part.window for name, part in told if part.effect == "enhance value"} == {late}


def test_what_is_not_controlled_is_told_with_the_reason() -> None:
    every = uncontrolled([*EFFECTS], ["remove", "reuse", "disable locally", "enhance logit"])
    assert every == (
        "not taken together: disable, enhance input (acts on later blocks too, so that the first of a set stands for "
        "it); enhance key, enhance value (enhance logit gained more)"
    )
    assert uncontrolled(["remove", "enhance key"], ["remove", "enhance key"]) == ""
    assert [name for name, _ in sets(Config(), MODEL, {("disable", WHOLE): gains(1)}, 24)] == [NO_OP]
    assert count(ProbeConfig(effects=("disable",)), 24) == 24
