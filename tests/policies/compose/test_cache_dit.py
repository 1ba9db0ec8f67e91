"""cache-dit is refused: it decides at each step which blocks are called, those of FLUX.1 from a list of its own.

Its masks over steps are taken.
"""

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy

from .models import FAMILY, new_scheduler, policy_for

cache_dit = pytest.importorskip("cache_dit")

RULES = [
    Rule(blocks=[1], action=Skip()),
    Rule(blocks=[1], action=Reuse(every=2)),
    Rule(blocks=[1], action=ScaleText(operand="value", scale=1.7)),
    Rule(blocks=[1], action=ScaleText(operand="input", scale=1.7, scope="local")),
]


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "wan"])
@pytest.mark.parametrize("rule", RULES, ids=["skip", "reuse", "value", "input"])
@pytest.mark.parametrize("first", ["cache-dit", "policy"])
def test_rules_are_refused_until_it_is_off(name, rule, first):
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    plain = family.denoise(model, scheduler)

    def enable() -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=1e3
        )
        cache_dit.enable_cache(model, cache_config=config)

    if first == "cache-dit":
        enable()
    with apply_policy(model, policy_for(model, rule), scheduler=scheduler):
        if first == "policy":
            enable()
        for _ in range(2):
            with pytest.raises(PolicyError, match=r"rules\[0\] acts on blocks, and cache-dit decides at each step"):
                family.denoise(model, scheduler)
        cache_dit.disable_cache(model)
        acted = family.denoise(model, scheduler)
    assert not torch.allclose(acted[-1], plain[-1], atol=1e-2)
    assert all(map(torch.equal, family.denoise(model, scheduler), plain))


def test_a_policy_without_rules_leaves_it_alone():
    family, scheduler = FAMILY["qwen-image"], new_scheduler()
    model = family.build()
    with apply_policy(model, policy_for(model), scheduler=scheduler):
        cache_dit.enable_cache(model, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
        family.denoise(model, scheduler)
    cache_dit.disable_cache(model)


@pytest.mark.parametrize(
    "asked",
    [{"compute_bins": [2, 1, 1], "cache_bins": [3, 2], "total_steps": 9}]
    + [{"mask_policy": name, "total_steps": 28} for name in ("slow", "medium", "fast", "ultra")],
    ids=lambda asked: asked.get("mask_policy", "bins"),
)
def test_its_masks_over_steps_are_obeyed(asked):
    family, scheduler = FAMILY["wan"], new_scheduler()
    model, mask = family.build(), cache_dit.steps_mask(**asked)
    assert {0, 1} == set(mask)
    scheduler.set_timesteps(len(mask))
    with apply_policy(model, BlockPolicy.from_step_mask(model, mask), scheduler=scheduler) as applied:
        for t in scheduler.timesteps:
            family.forward(model)
            scheduler.step(torch.zeros(1), t, torch.zeros(1))
    blocks = len(family.slots)
    assert applied.report.table == tuple((("reuse", "compute")[computes],) * blocks for computes in mask)
