"""Other hooks on blocks, and copies of a transformer that had a policy."""

import copy
import io
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from blocktune.policies import Reuse, Rule, ScaleText, Skip, apply_policy

from ..families import STEPS
from .models import FAMILY, generate, new_scheduler, policy_for

RULES = [
    Rule(blocks=[0], action=ScaleText(operand="value", scale=1.7)),
    Rule(blocks=[1], action=Reuse(every=2)),
    Rule(blocks=[2], window=(0.5, 1), action=Skip()),
]


class Doubled(ModelHook):
    """Counts its calls, and doubles the image that a block of SD3 returns."""

    def __init__(self) -> None:
        self.calls = 0

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.calls += 1
        return output[0], 2 * output[1]


@pytest.mark.parametrize("first", ["hook", "policy"])
@pytest.mark.parametrize("off_first", ["hook", "policy"])
def test_accelerate_hooks_on_blocks(tiny_sd3_pipeline, first, off_first):
    """Against torch's own forward hooks, put on before the policy."""
    by_hand = tiny_sd3_pipeline()
    for block in by_hand.transformer.transformer_blocks[:2]:
        block.register_forward_hook(lambda module, args, output: (output[0], 2 * output[1]))
    plain, doubled = generate(tiny_sd3_pipeline()), generate(by_hand)
    policy = policy_for(by_hand, *RULES)
    with apply_policy(by_hand, policy):
        expected = generate(by_hand)
    assert not torch.allclose(expected, doubled, atol=1e-2)

    pipe = tiny_sd3_pipeline()
    blocks = pipe.transformer.transformer_blocks[:2]
    hooks = [Doubled(), Doubled()]

    def put_on() -> None:
        for block, hook in zip(blocks, hooks, strict=True):
            add_hook_to_module(block, hook)

    if first == "hook":
        put_on()
    applied = apply_policy(pipe, policy)
    if first == "policy":
        put_on()
    torch.testing.assert_close(generate(pipe), expected)
    assert [hook.calls for hook in hooks] == [STEPS, STEPS // 2]  # the second reuses at every other step
    if off_first == "policy":
        applied.remove()
        torch.testing.assert_close(generate(pipe), doubled)
    for block in blocks:
        remove_hook_from_module(block)
    applied.remove()
    assert torch.equal(generate(pipe), plain)


class Counted(ModelHook):
    """Counts its calls, and changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.calls += 1
        return output


@pytest.mark.parametrize("name", FAMILY)
def test_accelerate_hooks_and_policies_come_and_go_in_any_order(name):
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    block, policy = family.block(model, 1), policy_for(model, *RULES[1:])
    plain = family.denoise(model, scheduler)
    with apply_policy(model, policy, scheduler=scheduler) as applied:
        expected = family.denoise(model, scheduler)
    computed = sum(row[1].startswith("compute") for row in applied.report.table)
    assert computed < len(applied.report.table)
    assert not all(map(torch.equal, expected, plain))
    for hook_first, hook_leaves_first in product((True, False), repeat=2):
        hook = Counted()
        if hook_first:
            add_hook_to_module(block, hook)
        applied = apply_policy(model, policy, scheduler=scheduler)
        if not hook_first:
            add_hook_to_module(block, hook)
        assert all(map(torch.equal, family.denoise(model, scheduler), expected))
        assert hook.calls == computed
        if hook_leaves_first:
            remove_hook_from_module(block)
            assert all(map(torch.equal, family.denoise(model, scheduler), expected))
            applied.remove()
        else:
            applied.remove()
            assert all(map(torch.equal, family.denoise(model, scheduler), plain))
            assert hook.calls > computed
            remove_hook_from_module(block)
        assert all(map(torch.equal, family.denoise(model, scheduler), plain))


@pytest.mark.parametrize("name", FAMILY)
def test_torch_hooks_see_what_blocks_see(name):
    """What a hook on a block is given, and may change, is what the block computes with under the policy."""
    family, scheduler = FAMILY[name], new_scheduler()
    model, calls = family.build(), []
    plain = family.denoise(model, scheduler)
    rules, acts = (RULES, 0) if family.hears("value") else (RULES[1:], -1)  # from the first step on, or at the last
    with apply_policy(model, policy_for(model, *rules), scheduler=scheduler) as applied:
        handles = [
            family.block(model, index).register_forward_hook(lambda *_, index=index: calls.append(index))
            for index in range(3)
        ]
        hooked = family.denoise(model, scheduler)
        assert calls == [i for row in applied.report.table for i in range(3) if row[i].startswith("compute")]
        for handle in handles:
            handle.remove()
        assert all(map(torch.equal, family.denoise(model, scheduler), hooked))
    assert not torch.equal(hooked[acts], plain[acts])


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux-dev", "wan"])
def test_copies_after_a_policy(name):
    """Nothing of a policy that was taken off goes along, and a copy can be given one of its own."""
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    plain = family.denoise(model, scheduler)
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    policy = policy_for(model, *RULES)
    with apply_policy(model, policy, scheduler=scheduler):
        expected = family.denoise(model, scheduler)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert {key: set(vars(module)) for key, module in copied.named_modules()} == attributes
        assert all(map(torch.equal, family.denoise(copied, scheduler), plain))
        with apply_policy(copied, policy, scheduler=scheduler):
            assert all(map(torch.equal, family.denoise(copied, scheduler), expected))
        assert all(map(torch.equal, family.denoise(model, scheduler), plain))


def test_layerwise_casting(tiny_sd3_pipeline):
    """Weights kept in float8 and cast for each layer's call, as diffusers' `enable_layerwise_casting` does."""
    pipe = tiny_sd3_pipeline()
    policy = policy_for(pipe, *RULES)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = generate(pipe)
    with apply_policy(pipe, policy) as applied:
        got = generate(pipe)
    assert (applied.report.skipped, applied.report.reused) == (2, 2)
    rounded = tiny_sd3_pipeline()
    for cast, layer in zip(pipe.transformer.modules(), rounded.transformer.modules(), strict=True):
        for name, weight in cast.named_parameters(recurse=False):
            layer._parameters[name] = torch.nn.Parameter(weight.float())
    assert torch.equal(generate(rounded), plain)
    with apply_policy(rounded, policy):
        assert torch.equal(generate(rounded), got)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert torch.equal(generate(pipe), plain)
