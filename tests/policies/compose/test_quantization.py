"""Quantised weights inside of blocks: a policy gives what it gives on the same weights written out again."""

from typing import Any

import pytest
import torch
from blocktune.policies import Reuse, Rule, ScaleText, Skip, apply_policy
from torch import nn

from .models import FAMILY, every_rule_acts, new_scheduler, policy_for

NAMES = ["sd3.5-medium", "flux2", "qwen-image", "wan"]


def rules_for(name: str) -> list[Rule]:
    rules = [
        Rule(blocks=[0], window=(0.5, 1), action=Skip()),
        Rule(blocks=[0], window=(0, 0.5), action=Reuse()),
        Rule(blocks=[1], action=Reuse(every=2)),
        Rule(blocks=[2], action=ScaleText(operand="value", scale=1.7)),
        Rule(blocks=[2], window=(0, 0.5), action=ScaleText(operand="key", scale=0.5)),
    ]
    return rules if name == "wan" else [*rules, Rule(blocks=[2], action=ScaleText(operand="logit", scale=1.7))]


def in_float32(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {n: v.float() if getattr(v, "dtype", None) == torch.float64 else v for n, v in kwargs.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_int8_weights(name):
    """torchao's weight-only quantisation, put on before the policy and under it."""
    torchao = pytest.importorskip("torchao.quantization")
    family, scheduler = FAMILY[name], new_scheduler()

    def build() -> nn.Module:
        model = family.build().float()  # torchao quantises no float64, which the inputs are in, too
        model.register_forward_pre_hook(in_float32, with_kwargs=True)
        return model

    def quantised() -> nn.Module:
        model = build()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    model, written_out = quantised(), quantised()
    for layer in written_out.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.dequantize())
    policy = policy_for(model, *rules_for(name))
    with apply_policy(written_out, policy, scheduler=scheduler):
        expected = family.denoise(written_out, scheduler)

    plain = family.denoise(model, scheduler)
    assert not torch.equal(plain[0], family.denoise(build(), new_scheduler())[0])  # it is quantised
    with apply_policy(model, policy, scheduler=scheduler) as applied:
        torch.testing.assert_close(family.denoise(model, scheduler), expected, rtol=1e-4, atol=1e-4)
    assert (applied.report.skipped, applied.report.reused) == (2, 3)
    assert every_rule_acts(
        lambda: torch.stack(family.denoise(model, scheduler)), model, rules_for(name), scheduler=scheduler
    )
    assert all(map(torch.equal, family.denoise(model, scheduler), plain))

    later = build()
    with apply_policy(later, policy, scheduler=scheduler):
        torchao.quantize_(later, torchao.Int8WeightOnlyConfig())
        torch.testing.assert_close(family.denoise(later, scheduler), expected, rtol=1e-4, atol=1e-4)
