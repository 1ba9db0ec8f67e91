"""Hooks of torch, accelerate and diffusers, and a policy, put on and taken off in any order, on every family."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from blocktune.policies import Reuse, Rule, Skip, apply_policy
from diffusers import hooks
from torch import nn
from torch.utils._pytree import tree_map_only

from ..by_hand import forward_as, identity, keeping_residuals
from ..families import FAMILIES, Family
from .models import new_scheduler, policy_for

PARTS = ("policy", "torch", "accelerate", "diffusers")
RULES = [Rule(blocks=[0], action=Skip()), Rule(blocks=[1], action=Reuse(every=2))]


def rolled(output: Any) -> Any:
    """What a hook does to each tensor: no norm undoes it, and two hooks do the same in either order."""
    return tree_map_only(torch.Tensor, lambda t: t.roll(1, dims=-1), output)


def latents_rolled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: rolled(value) if name in ("hidden_states", "x") else value for name, value in kwargs.items()}


class AccelerateHook(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return rolled(output)


class DiffusersHook(hooks.ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return rolled(output)


def put_on(part: str, family: Family, model: nn.Module, scheduler: Any) -> Callable[[], Any]:
    """Puts on a policy, or a library's hooks on a block and on the whole; gives what takes them off."""
    block = family.block(model, 2 if part == "diffusers" else 1)
    if part == "policy":
        return apply_policy(model, policy_for(model, *RULES), scheduler=scheduler).remove
    if part == "torch":
        handles = [
            block.register_forward_hook(lambda module, args, output: rolled(output)),
            model.register_forward_hook(lambda module, args, output: rolled(output)),
            model.register_forward_pre_hook(lambda _, args, kwargs: (args, latents_rolled(kwargs)), with_kwargs=True),
        ]
        return lambda: [handle.remove() for handle in handles]
    if part == "accelerate":
        add_hook_to_module(block, AccelerateHook())
        return lambda: remove_hook_from_module(block)
    registries = [hooks.HookRegistry.check_if_exists_or_initialize(module) for module in (block, model)]
    for registry in registries:
        registry.register_hook(DiffusersHook(), "rolled")
    return lambda: [registry.remove_hook("rolled", recurse=False) for registry in registries]


def two_steps(family: Family, model: nn.Module, scheduler: Any) -> torch.Tensor:
    scheduler.set_timesteps(2)
    outputs = []
    for step, t in enumerate(scheduler.timesteps):
        outputs.append(family.forward(model, batch=1, seed=step))
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    return torch.stack(outputs)


def by_hand(family: Family, model: nn.Module, on: frozenset[str]) -> torch.Tensor:
    """The run of a model without hooks, its forwards written anew: the innermost first."""
    with ExitStack() as stack:

        def around(module: nn.Module, latents: bool = False) -> None:
            inner = module.forward
            given = latents_rolled if latents else dict
            stack.enter_context(forward_as(module, lambda *args, **kwargs: rolled(inner(*args, **given(kwargs)))))

        first, second, third = (family.block(model, index) for index in range(3))
        for part, modules in (
            ("torch", (second, model)), ("accelerate", (second,)), ("diffusers", (third, model)),
        ):  # fmt: skip
            for module in modules if part in on else ():
                around(module, latents=part == "torch" and module is model)
        if "policy" in on:
            stack.enter_context(forward_as(first, identity(first, family.slots[0][0])))
            kept = keeping_residuals(second, family.slots[1][0], ["compute", "reuse"])
            stack.enter_context(forward_as(second, kept))
        return two_steps(family, model, new_scheduler())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name, scope="module")
def test_any_order_of_putting_on_and_taking_off(family, model):
    """Each of the four is put on and taken off three times, in an order of the family's own."""
    hooked, scheduler = family.build(), new_scheduler()
    order = list(PARTS) * 6
    random.Random(family.name).shuffle(order)
    takes_off: dict[str, Callable[[], Any]] = {}
    expected: dict[frozenset[str], torch.Tensor] = {}
    for part in order:
        if part in takes_off:
            takes_off.pop(part)()
        else:
            takes_off[part] = put_on(part, family, hooked, scheduler)
        on = frozenset(takes_off)
        if on not in expected:
            expected[on] = by_hand(family, model, on)
        torch.testing.assert_close(two_steps(family, hooked, scheduler), expected[on])
    assert not takes_off
    for i, one in enumerate(expected.values()):
        for other in list(expected.values())[:i]:
            assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(two_steps(family, hooked, scheduler), expected[frozenset()])
