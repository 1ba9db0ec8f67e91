"""How every family hears its text: each operand of each block against the model changed by hand (`by_hand.py`)."""

import itertools
from contextlib import ExitStack

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, apply_policy
from diffusers import FlowMatchEulerDiscreteScheduler

from .by_hand import forward_as, keeping_residuals, scaled_text
from .families import BLOCKS, FAMILIES, STEPS, TEXT_TOKENS, Family

OPERANDS = [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]
CASES = [(family, operand, scope) for family in FAMILIES for operand, scope in OPERANDS]


def cases(*chosen: tuple[Family, str, str | None]) -> pytest.MarkDecorator:
    ids = [f"{family.name}-{scope or operand}" for family, operand, scope in chosen]
    return pytest.mark.parametrize(("family", "operand", "scope"), chosen, ids=ids, scope="module")


heard = cases(*[case for case in CASES if case[0].hears(*case[1:])])


def policy_for(model: torch.nn.Module, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(model, "test", rules)


def all_text(family: Family, scale: float) -> torch.Tensor:
    """(1, text tokens): each token of `family.inputs()` as loud."""
    return torch.full((1, TEXT_TOKENS + family.registers), scale, dtype=torch.float64)


@heard
def test_the_reference_is_the_model(family, operand, scope, model, monkeypatch):
    expected = family.forward(model)
    for index in range(len(family.slots)):
        with scaled_text(monkeypatch, model, family, index, operand, scope, all_text(family, 1.0)):
            torch.testing.assert_close(family.forward(model), expected, rtol=1e-6, atol=1e-6)


@heard
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7])
def test_operand_is_as_written_out(family, operand, scope, model, monkeypatch, scale):
    expected = family.forward(model)
    for index in range(len(family.slots)):
        rule = Rule(blocks=[index], action=ScaleText(operand=operand, scale=scale, scope=scope))
        with apply_policy(model, policy_for(model, rule)) as applied:
            got = family.forward(model)
        assert applied.report.scaled == 1
        with scaled_text(monkeypatch, model, family, index, operand, scope, all_text(family, scale)):
            torch.testing.assert_close(got, family.forward(model), rtol=1e-5, atol=1e-5)
        # Blocks norm the text that they are given, so that a louder input is heard further on, if at all.
        if operand != "input" or scale == 0 or (scope == "propagate" and index < len(family.slots) - 1):
            assert not torch.allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.hears("value")], ids=lambda family: family.name, scope="module"
)
def test_operands_combine_on_one_block(family, model, monkeypatch):
    factors = [("key", None, 1.3), ("value", None, 0.7), ("input", "local", 0.0)]
    if family.hears("logit"):
        factors.append(("logit", None, 2.0))
    for index in (0, len(family.slots) - 1):
        rules = [Rule(blocks=[index], action=ScaleText(operand=o, scope=c, scale=s)) for o, c, s in factors]
        with apply_policy(model, policy_for(model, *rules)):
            got = family.forward(model)
        with ExitStack() as stack:
            for operand, scope, scale in factors:
                stack.enter_context(
                    scaled_text(monkeypatch, model, family, index, operand, scope, all_text(family, scale))
                )
            torch.testing.assert_close(got, family.forward(model), rtol=1e-5, atol=1e-5)


@cases(*[case for case in CASES if case[1] == "input" and case[0].hears(*case[1:])])
def test_reuse_with_scaled_text(family, operand, scope, model, monkeypatch):
    """The residual is counted from the text the block saw; the running stream is scaled at reusing steps, too.

    The blocks behind those that reuse compute, so that the picture shows what text they are given.
    """
    scheduler, blocks = FlowMatchEulerDiscreteScheduler(), [*range(0, len(family.slots), BLOCKS)]
    rules = [
        Rule(blocks=blocks, action=Reuse(every=2)),
        Rule(blocks=blocks, action=ScaleText(operand=operand, scale=1.7, scope=scope)),
    ]
    with apply_policy(model, policy_for(model, *rules), scheduler=scheduler) as applied:
        got = family.denoise(model, scheduler)
    with ExitStack() as stack:
        for index in blocks:
            block = family.block(model, index)
            kept = keeping_residuals(block, family.slots[index][0], ["compute", "reuse"] * 2)
            stack.enter_context(forward_as(block, kept))
            stack.enter_context(scaled_text(monkeypatch, model, family, index, operand, scope, all_text(family, 1.7)))
        torch.testing.assert_close(got, family.denoise(model, scheduler), rtol=1e-5, atol=1e-5)
    second = "reuse+scale" if scope == "propagate" else "reuse"
    for index, *column in zip(itertools.count(), *applied.report.table):
        assert column == (["compute+scale", second] * 2 if index in blocks else ["compute"] * STEPS)


@cases(*[case for case in CASES if not case[0].hears(*case[1:])])
def test_text_that_cannot_be_heard_is_refused(family, operand, scope, model):
    """One sentence names what cannot be: the operand or its scope, or, where text cannot be located, text itself."""
    name = type(model).__name__
    if not family.hears("value"):
        reason = f"scales text; {name} holds text and image in one stream with no locator"
        if model.config.get("added_kv_proj_dim") is not None:
            reason = f"scales text; where {name} has added_kv_proj_dim, image tokens stand in its text"
    elif operand == "logit":
        reason = f"operand is 'logit'; the image tokens of {name} attend to text apart"
    else:
        reason = f"scope is 'propagate'; every block of {name} hears the same text"
    rule = Rule(blocks=[0], action=ScaleText(operand=operand, scope=scope, scale=2.0))
    with pytest.raises(PolicyError, match=rf"rules\[0\]\.action(\.| ){reason}"):
        apply_policy(model, policy_for(model, rule))
