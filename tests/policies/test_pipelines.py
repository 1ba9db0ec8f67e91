"""FLUX.1 and Qwen-Image through their own pipelines: skip, reuse, windows and branches.

Under true guidance these call the transformer twice at each step: conditional, then unconditional.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import FluxImg2ImgPipeline
from torch import nn

from .by_hand import BRANCHES, changed, forward_as, identity, keeping_residuals
from .families import FAMILIES, Family
from .pipelines import STEPS, generate

FAMILY = {family.name: family for family in FAMILIES}
guidance = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


@pytest.fixture(scope="module", params=["flux-dev", "qwen-image"])
def family(request) -> Family:
    return FAMILY[request.param]


@pytest.fixture(scope="module")
def pipe(family, tiny_flux_pipeline, tiny_qwen_image_pipeline):
    return tiny_flux_pipeline if family.name == "flux-dev" else tiny_qwen_image_pipeline


def policy_for(pipe, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(pipe, "test", rules)


def replaced(model: nn.Module, family: Family, forwards: dict[int, Callable[..., Any]]) -> AbstractContextManager:
    """The blocks compute these forwards meanwhile."""
    stack = ExitStack()
    for index, by_hand in forwards.items():
        stack.enter_context(forward_as(family.block(model, index), by_hand))
    return stack


def skipped_by_hand(model: nn.Module, family: Family, blocks: list[int]) -> AbstractContextManager:
    return replaced(model, family, {i: identity(family.block(model, i), family.slots[i][0]) for i in blocks})


def branches_of(rule: Rule) -> tuple[str, ...]:
    return BRANCHES if rule.branch == "both" else (rule.branch,)


# --- nothing to do -----------------------------------------------------------------------------------------------


@guidance
def test_no_rules_is_bit_identical(pipe, family, guided):
    plain = generate(pipe, guided)
    rules = [Rule(blocks=range(len(family.slots)), action=ScaleText(operand="value", scale=1, tokens="prompt"))]
    for policy in (policy_for(pipe), policy_for(pipe, *rules)):
        with apply_policy(pipe, policy) as applied:
            assert torch.equal(generate(pipe, guided), plain)
        report = applied.report
        assert report.table == (("compute",) * len(family.slots),) * (STEPS * (1 + guided))
        assert report.skipped == report.reused == report.scaled == 0


# --- skip --------------------------------------------------------------------------------------------------------


@guidance
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
def test_skip_is_an_identity_in_its_window_and_branch(pipe, family, guided, branch):
    """Without guidance, the only call of a step is the conditional one."""
    blocks = [1, len(family.slots) - 1]
    rule = Rule(blocks=blocks, window=(0.5, 1), branch=branch, action=Skip())
    ran = []
    with ExitStack() as stack, apply_policy(pipe, policy_for(pipe, rule)) as applied:
        for index in range(len(family.slots)):
            block = family.block(pipe.transformer, index)
            stack.enter_context(block.register_forward_hook(lambda *_, index=index: ran.append(index)))
        got = generate(pipe, guided)

    def change(step: int, called: str) -> AbstractContextManager:
        acts = step >= STEPS // 2 and called in branches_of(rule)
        return skipped_by_hand(pipe.transformer, family, blocks) if acts else nullcontext()

    with changed(pipe, guided, change):
        assert torch.equal(got, generate(pipe, guided))
    acts = guided or branch != "uncond"
    assert torch.equal(got, generate(pipe, guided)) != acts

    table = [
        tuple(
            "skip" if index in blocks and step >= STEPS // 2 and called in branches_of(rule) else "compute"
            for index in range(len(family.slots))
        )
        for step in range(STEPS)
        for called in BRANCHES[: 1 + guided]
    ]
    assert applied.report.table == tuple(table)
    assert [call.step for call in applied.report.calls] == [s for s in range(STEPS) for _ in range(1 + guided)]
    assert ran == [index for row in table for index, entry in enumerate(row) if entry == "compute"]


# --- reuse -------------------------------------------------------------------------------------------------------


def reused_by_hand(pipe, family: Family, guided: bool, branch: str, blocks: list[int], reused: list[int]) -> Any:
    """Each branch keeps residuals of its own."""
    model = pipe.transformer
    forwards = {}
    for called in BRANCHES:
        acts = branch in ("both", called)
        kinds = ["reuse" if acts and step in reused else "compute" for step in range(STEPS)]
        forwards[called] = {
            index: keeping_residuals(family.block(model, index), family.slots[index][0], kinds) for index in blocks
        }
    with changed(pipe, guided, lambda step, called: replaced(model, family, forwards[called])):
        return generate(pipe, guided)


@guidance
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
@pytest.mark.parametrize(
    ("window", "every", "reused"), [((0, 1), 2, [1, 3]), ((0, 1), None, [1, 2, 3]), ((0.5, 1), None, [2, 3])]
)
def test_reuse_adds_the_last_residual_of_its_branch(pipe, family, guided, branch, window, every, reused):
    blocks = [0, len(family.slots) - 1]
    rule = Rule(blocks=blocks, window=window, branch=branch, action=Reuse(every=every))
    with apply_policy(pipe, policy_for(pipe, rule)) as applied:
        got = generate(pipe, guided)
        report = applied.report
        assert torch.equal(generate(pipe, guided), got)  # nothing of the first run is left in the second
    torch.testing.assert_close(got, reused_by_hand(pipe, family, guided, branch, blocks, reused), rtol=1e-4, atol=1e-4)
    table = [
        tuple(
            "reuse" if index in blocks and step in reused and called in branches_of(rule) else "compute"
            for index in range(len(family.slots))
        )
        for step in range(STEPS)
        for called in BRANCHES[: 1 + guided]
    ]
    assert report.table == tuple(table)
    assert torch.allclose(got, generate(pipe, guided), atol=1e-3) != (report.reused > 0)


def test_no_residual_outlives_its_run(pipe, family):
    """Runs without guidance, with it, of another batch and resolution, and failed in either call of a step."""
    policy = policy_for(pipe, Rule(blocks=range(len(family.slots)), action=Reuse(every=3)))
    with apply_policy(pipe, policy):
        fresh = {guided: generate(pipe, guided) for guided in (False, True)}

    def fail_at(call: int) -> Callable[..., None]:
        calls = itertools.count()

        def hook(*_: Any) -> None:
            if next(calls) == call:
                raise RuntimeError("out of memory")

        return hook

    with apply_policy(pipe, policy):
        for other in ({"prompt": ["a cat", "a red dog"]}, {"height": 24}, {"num_inference_steps": 3}):
            for guided in (True, False):
                negative = {"negative_prompt": ["a dog"] * 2} if guided and "prompt" in other else {}
                generate(pipe, guided, **other, **negative)
                assert torch.equal(generate(pipe, guided), fresh[guided])
        for call in (1, 2, 5):
            failing = pipe.transformer.norm_out.register_forward_hook(fail_at(call))
            with failing, pytest.raises(RuntimeError, match="out of memory"):
                generate(pipe, guided=True)
            assert torch.equal(generate(pipe, guided=True), fresh[True])
            assert torch.equal(generate(pipe), fresh[False])


# --- steps -------------------------------------------------------------------------------------------------------


STARTED = {"image": torch.zeros(1, 3, 16, 16), "strength": 0.7, "num_inference_steps": 10}  # at step 3 of 10


@pytest.fixture(scope="module")
def image_to_image(tiny_flux_pipeline) -> FluxImg2ImgPipeline:
    pipe = FluxImg2ImgPipeline(**tiny_flux_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_image_to_image_starts_inside_the_windows(image_to_image):
    pipe, family, model = image_to_image, FAMILY["flux-dev"], image_to_image.transformer
    rules = [Rule(blocks=[1], window=(0.5, 1), action=Skip()), Rule(blocks=[2], action=Reuse(every=2))]
    with apply_policy(pipe, policy_for(pipe, *rules)) as applied:
        got = generate(pipe, **STARTED)
    kinds = ["compute", "reuse"] * 3 + ["compute"]
    assert [call.step for call in applied.report.calls] == [*range(3, 10)]
    assert [call.blocks[1] for call in applied.report.calls] == ["compute"] * 2 + ["skip"] * 5
    assert [call.blocks[2] for call in applied.report.calls] == kinds

    reused = {2: keeping_residuals(family.block(model, 2), family.slots[2][0], kinds)}
    skipped = {1: identity(family.block(model, 1), family.slots[1][0])}
    with changed(pipe, False, lambda call, _: replaced(model, family, reused | (skipped if call > 1 else {}))):
        torch.testing.assert_close(got, generate(pipe, **STARTED), rtol=1e-4, atol=1e-4)


def test_branches_that_a_pipeline_does_not_name_share_no_residuals(image_to_image):
    """FLUX's image-to-image pipeline calls twice at a step and does not say which call is which."""
    pipe, family = image_to_image, FAMILY["flux-dev"]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=Skip()))) as applied:
        got = generate(pipe, guided=True, **STARTED)
    assert applied.report.skipped == 14
    with changed(pipe, True, lambda *_: skipped_by_hand(pipe.transformer, family, [1])):
        assert torch.equal(got, generate(pipe, guided=True, **STARTED))
    model, kinds = pipe.transformer, ["compute", "reuse"] * 3 + ["compute"]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=Reuse(every=2)))) as applied:
        got = generate(pipe, guided=True, **STARTED)
    assert [call.branch for call in applied.report.calls] == [*BRANCHES] * 7
    forwards = {
        called: {1: keeping_residuals(family.block(model, 1), family.slots[1][0], kinds)} for called in BRANCHES
    }
    with changed(pipe, True, lambda _, called: replaced(model, family, forwards[called])):
        torch.testing.assert_close(got, generate(pipe, guided=True, **STARTED), rtol=1e-4, atol=1e-4)


@guidance
def test_windows_are_fractions_of_the_schedule_at_hand(pipe, family, guided):
    """A run with three steps, given by its noise levels, and then one with four, under one policy."""
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], window=(0.5, 1), action=Skip()))) as applied:
        generate(pipe, guided, sigmas=[1.0, 0.6, 0.2], num_inference_steps=3)
        shortened = applied.report
        generate(pipe, guided)
    column = [call.blocks[1] for call in shortened.calls]
    assert column == ["compute"] * 2 * (1 + guided) + ["skip"] * (1 + guided)
    column = [call.blocks[1] for call in applied.report.calls]
    assert column == ["compute"] * 2 * (1 + guided) + ["skip"] * 2 * (1 + guided)
