"""Beside diffusers' caches a policy gives what the same cache gives on the model changed by hand, or is refused.

Every run counts block or attention calls, so that it is known that the cache really answered for some.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, SeaCacheConfig, apply_faster_cache, apply_first_block_cache, apply_mag_cache
from torch import nn

from ..by_hand import forward_as, identity, scaled_text
from ..families import STEPS, TEXT_TOKENS, Family
from .models import FAMILY, generate, new_scheduler, policy_for, without

FLUX = FAMILY["flux-dev"]
MIDDLE = 4  # a single-stream block, neither first nor last
LOUDER = torch.full((1, TEXT_TOKENS), 1.7)  # of every text token
NOW = [0.0]  # the timestep of a run, for caches that ask
BY_FIRST_BLOCK = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=1e3),
    "MagCache": lambda: MagCacheConfig(
        threshold=1e3, max_skip_steps=1, retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "SeaCache": lambda: SeaCacheConfig(
        threshold=1e3, raw_vision_callback=lambda module, args, kwargs: [kwargs["hidden_states"].view(4, 2, 4, 4)]
    ),
}
BY_CALLS = {
    "TaylorSeerCache": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float64
    ),
    "PyramidAttentionBroadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: NOW[0],
    ),
    "FasterCache": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks.*attn",),
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: NOW[0],
    ),
}
CACHES = BY_FIRST_BLOCK | BY_CALLS
by_cache = pytest.mark.parametrize("cache", CACHES)


def denoise(model: nn.Module, scheduler: Any = None) -> list[torch.Tensor]:
    """A run whose every call a pipeline would name, with latents, text and time of its own at each step."""
    scheduler = scheduler or new_scheduler()
    scheduler.set_timesteps(STEPS)
    outputs = []
    for step, t in enumerate(scheduler.timesteps):
        NOW[0], sigma = float(t), float(scheduler.sigmas[step])
        with model.cache_context("cond", step_index=step, sigma=sigma, num_inference_steps=STEPS):
            outputs.append(FLUX.forward(model, seed=step))
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    model._reset_stateful_cache()
    return outputs


def attentions_of(model: nn.Module) -> list[int]:
    """Grows by one for each attention that is computed."""
    computed: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("attn.to_v"):
            module.register_forward_hook(lambda *_: computed.append(1))
    return computed


def cached(cache: str, build: Callable[[], nn.Module] = FLUX.build) -> tuple[nn.Module, list[int]]:
    model = build()
    computed = attentions_of(model)
    model.enable_cache(CACHES[cache]())
    return model, computed


@by_cache
@pytest.mark.parametrize("first", ["cache", "policy"])
def test_skip_is_removal_under_the_same_cache(cache, first):
    smaller, expected_calls = cached(cache, lambda: without(FLUX, MIDDLE))
    expected = denoise(smaller)
    assert 0 < len(expected_calls) < STEPS * (len(FLUX.slots) - 1)  # the cache answered for some

    model, scheduler = FLUX.build(), new_scheduler()
    computed = attentions_of(model)
    policy = policy_for(model, Rule(blocks=[MIDDLE], action=Skip()))
    if first == "cache":
        model.enable_cache(CACHES[cache]())
    with apply_policy(model, policy, scheduler=scheduler) as applied:
        if first == "policy":
            model.enable_cache(CACHES[cache]())
        got = denoise(model, scheduler)
        assert all(map(torch.equal, got, expected))
        assert len(computed) == len(expected_calls)
        assert all(map(torch.equal, denoise(model, scheduler), expected))  # a second run starts afresh
    assert applied.report.skipped == STEPS

    unskipped = denoise(model)
    assert not any(map(torch.equal, unskipped, got))
    assert all(map(torch.equal, unskipped, denoise(cached(cache)[0])))
    model.disable_cache()
    assert all(map(torch.equal, denoise(model), denoise(FLUX.build())))


@pytest.mark.parametrize("cache", BY_FIRST_BLOCK)
def test_windowed_skip_beside_caches_that_decide_by_the_first_block(cache):
    def in_window(model: nn.Module) -> list[torch.Tensor]:
        """The middle block leaves its inputs as they are from step 1 on."""
        block, (container, _) = FLUX.block(model, MIDDLE), FLUX.slots[MIDDLE]
        as_it_was, left_out, calls = block.forward, identity(block, container), []

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (as_it_was if len(calls) < 1 else left_out)(*args, **kwargs)

        model.register_forward_hook(lambda *_: calls.append(1))
        with forward_as(block, forward):
            enable(model)
            outputs = denoise(model)
            model.disable_cache()
        return outputs

    def enable(model: nn.Module) -> None:
        config = CACHES[cache]()
        if cache == "FirstBlockCache":
            config.threshold = 1.28  # computes at step 1, too, and reuses that
        model.enable_cache(config)

    expected = in_window(FLUX.build())
    model, scheduler = FLUX.build(), new_scheduler()
    enable(model)
    plain = denoise(model)
    policy = policy_for(model, Rule(blocks=[MIDDLE], window=(0.25, 1), action=Skip()))
    with apply_policy(model, policy, scheduler=scheduler):
        got = denoise(model, scheduler)
    assert all(map(torch.equal, got, expected))
    assert not all(map(torch.equal, got, plain))


@by_cache
@pytest.mark.parametrize(
    ("operand", "scope"), [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]
)
@pytest.mark.parametrize("block", [0, 1, MIDDLE, 5])
def test_scaled_text_is_right_or_refused(monkeypatch, cache, operand, scope, block):
    (model, computed), scheduler = cached(cache), new_scheduler()
    rule = Rule(blocks=[block], action=ScaleText(operand=operand, scale=1.7, scope=scope))
    with apply_policy(model, policy_for(model, rule), scheduler=scheduler):
        if cache in BY_CALLS and operand != "input":
            with pytest.raises(PolicyError, match=rf"rules\[0\] scales the text's {operand}, and {cache} answers for"):
                denoise(model, scheduler)
            return
        got = denoise(model, scheduler)
    assert 0 < len(computed) < STEPS * len(FLUX.slots)
    other = FLUX.build()
    with scaled_text(monkeypatch, other, FLUX, block, operand, scope, LOUDER):
        other.enable_cache(CACHES[cache]())  # outside of what was done by hand, as stand-ins are outside of it
        torch.testing.assert_close(got, denoise(other), rtol=1e-5, atol=1e-5)  # rotated in float32
    # Blocks norm their text, and single-stream ones make attention and MLP from the same: they hear no change of size.
    if operand != "input" or block < {"propagate": 5, "local": 3}[scope]:
        assert not torch.allclose(torch.stack(got), torch.stack(denoise(model)), atol=1e-4)


REUSE = Rule(blocks=[MIDDLE], action=Reuse(every=2))
HEAD, TAIL = Rule(blocks=[0], action=Skip()), Rule(blocks=[MIDDLE, 5], action=Skip())
WINDOW = Rule(blocks=[MIDDLE], window=(0.5, 1), action=Skip())
BY_FIRST_BLOCK_REFUSED = {
    "reuse": (REUSE, "reuses, and "),
    "head": (HEAD, "skips block 0, by which "),
    "tail": (TAIL, "skips block 5, by which "),
}
BY_CALLS_REFUSED = {"reuse": (REUSE, "reuses, and "), "window": (WINDOW, "skips in a window, and ")}
REFUSED = [
    pytest.param(cache, *case, id=f"{cache}-{name}")
    for caches, refused in [(BY_FIRST_BLOCK, BY_FIRST_BLOCK_REFUSED), (BY_CALLS, BY_CALLS_REFUSED)]
    for cache in caches
    for name, case in refused.items()
]


@pytest.mark.parametrize(("cache", "rule", "reason"), REFUSED)
@pytest.mark.parametrize("first", ["cache", "policy"])
def test_what_they_would_disturb_is_refused(cache, first, rule, reason):
    model, scheduler = FLUX.build(), new_scheduler()
    with ExitStack() as stack:
        if first == "policy":
            stack.enter_context(apply_policy(model, policy_for(model, rule), scheduler=scheduler))
        model.enable_cache(CACHES[cache]())
        if first == "cache":
            stack.enter_context(apply_policy(model, policy_for(model, rule), scheduler=scheduler))
        for _ in range(2):
            with pytest.raises(PolicyError) as refusal:
                denoise(model, scheduler)
            assert str(refusal.value).startswith(f"rules[0] {reason}{cache}")
        model.disable_cache()
        denoise(model, scheduler)  # as soon as the cache is off


@pytest.mark.parametrize("cache", BY_CALLS)
@pytest.mark.parametrize("rule", [HEAD, TAIL], ids=["head", "tail"])
def test_caches_that_count_calls_do_without_the_first_or_last_block(cache, rule):
    smaller, computed = cached(cache, lambda: without(FLUX, *rule.blocks))
    expected = denoise(smaller)
    assert 0 < len(computed) < STEPS * (len(FLUX.slots) - len(rule.blocks))  # the cache answered for some
    (model, _), scheduler = cached(cache), new_scheduler()
    plain = denoise(model)
    with apply_policy(model, policy_for(model, rule), scheduler=scheduler):
        got = denoise(model, scheduler)
    assert all(map(torch.equal, got, expected))
    assert not any(map(torch.equal, got, plain))


@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_caches_that_were_put_on_by_hand_are_seen(family):
    """Not by `enable_cache`, which SD3 has not: its model bears no mark of them."""
    family: Family = FAMILY[family]
    model = family.build()
    apply_mag_cache(model, BY_FIRST_BLOCK["MagCache"]())
    with (
        apply_policy(model, policy_for(model, Rule(blocks=[0], action=Skip()))),
        pytest.raises(PolicyError, match="skips block 0, by which MagCache decides; take that off"),
    ):
        family.forward(model)
    model = family.build()
    apply_first_block_cache(model, FirstBlockCacheConfig())
    last = len(family.slots) - 1
    with (
        apply_policy(model, policy_for(model, Rule(blocks=[last], action=Skip()))),
        pytest.raises(PolicyError, match=rf"skips block {last}, by which FirstBlockCache decides; take that off"),
    ):
        family.forward(model)


@pytest.fixture
def faster_sd3(tiny_sd3_pipeline):
    """FasterCache put on by hand: at some steps it takes the unconditional row out of the batch."""
    pipe = tiny_sd3_pipeline()
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks.*attn",),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 900),
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "pooled_projections",
        ],
        current_timestep_callback=lambda: 500,
    )
    apply_faster_cache(pipe.transformer, config)
    return pipe


@pytest.mark.parametrize("which", [{"branch": "cond"}, {"branch": "uncond"}, {"tokens": "prompt"}])
def test_rows_cannot_be_told_apart_under_faster_cache(faster_sd3, which):
    action = ScaleText(operand="input", scale=1.7, tokens=which.get("tokens", "all"))
    rule = Rule(blocks=[1], branch=which.get("branch", "both"), action=action)
    with (
        apply_policy(faster_sd3, policy_for(faster_sd3, rule)),
        pytest.raises(PolicyError, match=r"rules\[0\] scales text row by row, and FasterCache takes rows out"),
    ):
        generate(faster_sd3)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_all_rows_are_scaled_alike_under_faster_cache(faster_sd3):
    model, rows = faster_sd3.transformer, []
    block = model.transformer_blocks[1]
    block.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    rule = Rule(blocks=[1], action=ScaleText(operand="input", scale=1.7))
    with apply_policy(faster_sd3, policy_for(faster_sd3, rule)):
        got = generate(faster_sd3)
    assert set(rows) == {1, 2}
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    plain = generate(faster_sd3)
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    block.register_forward_pre_hook(
        lambda module, args, given: (args, given | {"encoder_hidden_states": 1.7 * given["encoder_hidden_states"]}),
        with_kwargs=True,
    )
    torch.testing.assert_close(got, generate(faster_sd3))
    assert not torch.allclose(got, plain, atol=1e-4)
