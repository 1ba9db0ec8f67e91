"""Guidance in a part of the run: outside of it the conditional half is computed alone and stands for both."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import FirstBlockCacheConfig
from torch import nn

from .by_hand import forward_as, keeping_residuals
from .families import FAMILIES, STEPS, Family, stacked
from .guided import Pipeline
from .pipelines import generate

FAMILY = {family.name: family for family in FAMILIES}
WINDOWS = [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]


def policy_for(pipe: Any, window: tuple[float, float], *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(pipe, "test", rules, guidance_window=window)


def guided_at(window: tuple[float, float], step: int) -> bool:
    return window[0] <= step / STEPS < window[1]


def rows_of_first_block(model: nn.Module, family: Family, seen: list[int]) -> Any:
    return family.block(model, 0).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )


# --- every family ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [name for name in FAMILY if name != "z-image"])
def test_the_conditional_half_stands_for_both(name, window):
    family = FAMILY[name]
    pipe = Pipeline(family.build())
    expected, seen = pipe(family), list[int]()
    for step, rows in enumerate(expected):
        if not guided_at(window, step):
            rows[0] = rows[1]
    with apply_policy(pipe, policy_for(pipe, window)) as applied, ExitStack() as stack:
        hook = rows_of_first_block(pipe.transformer, family, seen)
        stack.callback(hook.remove)
        torch.testing.assert_close(pipe(family), expected)
    guided = [guided_at(window, step) for step in range(STEPS)]
    # without guidance a row, or the one call of the two
    assert seen == [rows for g in guided for rows in ([1, 1][: 1 + g] if pipe.calls else [1 + g])]
    blocks, unguided = len(family.slots), guided.count(False)
    assert applied.report.skipped == (unguided * blocks if pipe.calls else 0)
    if not pipe.calls:
        assert [call.branch for call in applied.report.calls] == ["both" if g else "cond" for g in guided]


def test_z_image_ends_guidance_by_itself():
    pipe = Pipeline(FAMILY["z-image"].build())
    with pytest.raises(PolicyError, match=r"guidance_window is \[0.0, 0.5\]; .* end guidance by their own cfg_trunc"):
        apply_policy(pipe, policy_for(pipe, (0, 0.5)))


# --- beside rules, through real pipelines -------------------------------------------------------------------------


@pytest.fixture(params=["sd3", "flux-dev", "qwen-image"])
def real(request, tiny_sd3_t5_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline):
    pipes = {"sd3": tiny_sd3_t5_pipeline, "flux-dev": tiny_flux_pipeline, "qwen-image": tiny_qwen_image_pipeline}
    name = "sd3.5-large" if request.param == "sd3" else request.param
    return pipes[request.param], FAMILY[name]


def by_hand(pipe: Any, window: tuple[float, float], kinds: dict[str, list[str]], family: Family, blocks: list[int]):
    """The pipeline's picture when both halves are computed and one replaced; `blocks` keep residuals, as `kinds`."""
    model, original, calls, last = pipe.transformer, pipe.transformer.forward, [0], [torch.empty(0)]
    branches = list(kinds)

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(calls[0], len(branches))
        calls[0] += 1
        with ExitStack() as stack:
            for index in blocks:
                stack.enter_context(forward_as(family.block(model, index), forwards[branches[branch]][index]))
            (sample,) = original(*args, **kwargs)
        if guided_at(window, step):
            return (sample,)
        if len(branches) == 2:
            last[0] = last[0] if branch else sample
            return (last[0],)
        return (torch.cat([sample[len(sample) // 2 :]] * 2),)

    forwards = {
        branch: {i: keeping_residuals(family.block(model, i), family.slots[i][0], kinds[branch]) for i in blocks}
        for branch in branches
    }
    with forward_as(model, forward):
        return generate(pipe, True)


@pytest.mark.parametrize(
    ("window", "action", "both", "cond", "uncond"),
    [
        # a residual of both halves goes on serving the conditional one
        ((0.0, 0.5), Reuse(), "crrr", "crrr", "crrr"),
        ((0.25, 1.0), Reuse(), "ccrr", "crrr", "ccrr"),  # and one of the conditional half alone does not serve both
        ((0.0, 0.5), Reuse(every=2, forecast="linear"), "crcf", "crcf", "crcr"),
        ((0.25, 1.0), Reuse(every=2, forecast="linear"), "ccrc", "crcf", "ccrc"),
    ],
)
def test_reuse_goes_on_where_guidance_ends_and_begins_anew_where_it_begins(real, window, action, both, cond, uncond):
    pipe, family = real
    blocks = [0, len(family.slots) - 1]
    rule = Rule(blocks=blocks, action=action)
    with apply_policy(pipe, policy_for(pipe, window, rule)) as applied:
        got = generate(pipe, True)
        assert torch.equal(generate(pipe, True), got)
    letters = {"c": "compute", "r": "reuse", "f": "forecast"}
    if family.name == "sd3.5-large":
        kinds = {"both": [letters[x] for x in both]}
        assert [row[0] for row in applied.report.table] == [letters[x] for x in both.replace("f", "r")]
    else:
        kinds = {"cond": [letters[x] for x in cond], "uncond": [letters[x] for x in uncond]}
    torch.testing.assert_close(got, by_hand(pipe, window, kinds, family, blocks), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, generate(pipe, True), atol=1e-3)


def test_text_is_scaled_by_branch_and_phrase_on_both_sides(real):
    """What is scaled in the conditional half is the same whether the other half is there or not."""
    pipe, family = real
    scaling = ScaleText(operand="value", scale=2.0, tokens=("cat",))
    rule = Rule(blocks=[1], branch="cond", action=scaling)
    with apply_policy(pipe, policy_for(pipe, (0, 0.5), rule)):
        got = generate(pipe, True)
    with apply_policy(pipe, policy_for(pipe, (0, 1), rule)):
        kinds = ["both"] if family.name == "sd3.5-large" else ["cond", "uncond"]
        expected = by_hand(pipe, (0, 0.5), {kind: [] for kind in kinds}, family, [])
        assert not torch.allclose(got, generate(pipe, True), atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_it_is_what_a_callback_of_stable_diffusion_does(tiny_sd3_t5_pipeline):
    """diffusers' own way to end guidance: a callback that takes the unconditional half off."""
    pipe = tiny_sd3_t5_pipeline

    def end(pipe: Any, step: int, _: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == STEPS // 2:
            pipe._guidance_scale = 1.0
            kept = {name: rows.chunk(2)[-1] for name, rows in kept.items()}
        return kept

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    expected = generate(pipe, True, callback_on_step_end=end, callback_on_step_end_tensor_inputs=names)
    with apply_policy(pipe, policy_for(pipe, (0, 0.5))):
        torch.testing.assert_close(generate(pipe, True), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_out_without_guidance(real):
    pipe, _ = real
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, (0, 0.5))) as applied:
        assert torch.equal(generate(pipe), plain)
    assert applied.report.skipped == 0


def test_skip_layer_guidance_goes_on(tiny_sd3_t5_pipeline):
    """Its call is of the conditional half alone, and of no other half."""
    pipe = tiny_sd3_t5_pipeline
    layers = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    with apply_policy(pipe, policy_for(pipe, (0, 0.5), Rule(blocks=[0], action=Skip()))) as applied:
        generate(pipe, True, **layers)
    assert [call.branch for call in applied.report.calls] == ["both", "both"] * 2 + ["cond", "both"] * 2


def test_a_compiled_transformer_obeys(tiny_sd3_t5_pipeline):
    pipe = tiny_sd3_t5_pipeline
    policy = policy_for(pipe, (0, 0.5), Rule(blocks=[0], window=(0.25, 1), action=Reuse()))
    with apply_policy(pipe, policy):
        expected = generate(pipe, True)
    transformer, torch_forward = pipe.transformer, pipe.transformer._compiled_call_impl
    transformer.compile(backend="eager")
    try:
        with apply_policy(pipe, policy):
            torch.testing.assert_close(generate(pipe, True), expected, rtol=1e-4, atol=1e-4)
    finally:
        transformer._compiled_call_impl = torch_forward
        torch._dynamo.reset()


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refuses_what_cannot_tell_halves_or_steps(tiny_sd3_t5_pipeline):
    pipe = tiny_sd3_t5_pipeline
    policy = policy_for(pipe, (0.25, 1))
    with pytest.raises(PolicyError, match=r"guidance_window is \[0.25, 1.0\]; a half of guidance can be told only"):
        apply_policy(pipe.transformer, policy, scheduler=pipe.scheduler)
    family = FAMILY["sd3.5-large"]
    other = Pipeline(family.build())
    other.scheduler = None
    with pytest.raises(PolicyError, match=r"guidance_window is \[0.25, 1.0\], which takes the step of the run, but no"):
        apply_policy(other, policy_for(other, (0.25, 1)))


def test_refuses_a_cache_that_keeps_both_halves():
    family = FAMILY["qwen-image"]
    pipe = Pipeline(family.build())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    with apply_policy(pipe, policy_for(pipe, (0, 0.5))), pytest.raises(PolicyError, match="FirstBlockCache keeps what"):
        pipe(family)


def test_refuses_a_batch_of_more_than_two_parts():
    family = FAMILY["sd3.5-large"]
    pipe = Pipeline(family.build())
    pipe.scheduler.set_timesteps(STEPS)
    with (
        apply_policy(pipe, policy_for(pipe, (0.5, 1))),
        pytest.raises(PolicyError, match="This batch of 3 rows is not an unconditional and a conditional half"),
        torch.no_grad(),
    ):
        stacked(pipe.transformer(**family.inputs(batch=3)))
