"""What the tests of composition share: tiny models by name, and the answers that a policy is held against."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ..families import FAMILIES, Family

FAMILY: dict[str, Family] = {family.name: family for family in FAMILIES}
# What offloaded pipelines are to obey: each action, in blocks that come and go.
OFFLOADED = [
    Rule(blocks=[0], window=(0, 0.5), action=ScaleText(operand="logit", scale=1.7)),
    Rule(blocks=[0], window=(0.5, 1), action=Skip()),
    Rule(blocks=[1], branch="cond", action=ScaleText(operand="input", scale=1.5)),
    Rule(blocks=[2], action=Reuse(every=2)),
    Rule(blocks=[3], action=ScaleText(operand="value", scale=1.7)),
]


def policy_for(target: Any, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(target, "test", rules)


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def without(family: Family, *blocks: int) -> nn.Module:
    """The family's model with blocks physically removed."""
    model = family.build()
    for index in sorted(blocks, reverse=True):
        container, place = family.slots[index]
        del getattr(model, container.name)[place]
    return model


def every_rule_acts(run: Callable[[], torch.Tensor], target: Any, rules: Sequence[Rule], **given: Any) -> bool:
    """Whether each rule by itself changes what `run` returns; beside others one that does nothing could go unseen."""
    plain = run()
    for rule in rules:
        with apply_policy(target, policy_for(target, rule), **given):
            if torch.allclose(run(), plain, atol=1e-3):
                return False
    return torch.equal(run(), plain)


def generate(pipe: Any, **kwargs: Any) -> torch.Tensor:
    """Latents (1, 4, 8, 8) of the tiny SD3 pipeline in 4 steps, with guidance."""
    defaults = {
        "prompt": "a cat",
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 4,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    return pipe(**defaults | kwargs).images
