"""Training and autocast under a policy: gradients, recomputed or not, inference mode, and other precisions."""

import pytest
import torch
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from torch import nn

from ..families import Family, stacked
from .models import FAMILY, every_rule_acts, generate, new_scheduler, policy_for

NAMES = ["sd3.5-medium", "flux-dev", "flux2", "qwen-image", "wan"]
OPERANDS = [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]


def gradients(model: nn.Module, family: Family) -> list[torch.Tensor]:
    """Of every parameter that plays a part."""
    loss = stacked(model(**family.inputs())).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize(
    ("name", "operand", "scope"),
    [(name, *heard) for name in NAMES for heard in OPERANDS if FAMILY[name].hears(*heard)],
)
def test_gradient_checkpointing_recomputes_under_the_policy(name, operand, scope):
    """The backward pass runs blocks again when the policy no longer stands in the model."""
    family = FAMILY[name]
    model = family.build()
    plain = gradients(model, family)
    skipped = Rule(blocks=[1], action=Skip())
    rules = [Rule(blocks=[0], action=ScaleText(operand=operand, scale=1.7, scope=scope)), skipped]
    with apply_policy(model, policy_for(model, *rules)):
        expected = gradients(model, family)
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(model, family), expected)
    assert len(expected) < len(plain)  # those of the skipped block are missing
    model.disable_gradient_checkpointing()
    with apply_policy(model, policy_for(model, skipped)):
        assert not torch.allclose(gradients(model, family)[-1], expected[-1], rtol=1e-3)


def test_reuse_is_refused_where_blocks_run_again():
    family, scheduler = FAMILY["flux-dev"], new_scheduler()
    model = family.build()
    model.enable_gradient_checkpointing()
    inputs = family.inputs()
    with apply_policy(model, policy_for(model, Rule(blocks=[1], action=Reuse(every=2))), scheduler=scheduler):
        family.denoise(model, scheduler)  # without gradients
        scheduler.set_timesteps(2)
        with pytest.raises(
            PolicyError, match=r"rules\[0\] reuses, and gradient checkpointing would run the block agai"
        ):
            model(**inputs)


def test_gradients_flow_through_a_reused_residual():
    family, scheduler = FAMILY["flux-dev"], new_scheduler()
    model = family.build()
    with apply_policy(model, policy_for(model, Rule(blocks=[1], action=Reuse(every=2))), scheduler=scheduler):
        scheduler.set_timesteps(2)
        model(**family.inputs())
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
        loss = stacked(model(**family.inputs(seed=1))).square().sum()
    weight = family.block(model, 1).attn.to_v.weight
    assert torch.autograd.grad(loss, weight)[0].abs().max() > 0


@pytest.mark.parametrize(("operand", "scope"), OPERANDS)
def test_training_after_inference_mode(operand, scope):
    """What was made for a run in inference mode is not met again by one that keeps gradients."""
    family = FAMILY["flux-dev"]
    model = family.build()
    rule = Rule(blocks=[1], action=ScaleText(operand=operand, scale=1.7, scope=scope))
    with apply_policy(model, policy_for(model, rule)):
        expected = gradients(model, family)
    with apply_policy(model, policy_for(model, rule)):
        with torch.inference_mode():
            inferred = stacked(model(**family.inputs()))
        torch.testing.assert_close(gradients(model, family), expected)
        torch.testing.assert_close(family.forward(model), inferred.clone())


RULES = [
    Rule(blocks=[0], action=ScaleText(operand="logit", scale=1.7)),
    Rule(blocks=[0], action=ScaleText(operand="value", scale=0.5)),
    Rule(blocks=[1], action=Reuse(every=2)),
    Rule(blocks=[1], branch="cond", action=ScaleText(operand="input", scale=1.5)),
    Rule(blocks=[2], window=(0.5, 1), action=Skip()),
]


def test_autocast_is_near_full_precision(tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *RULES)) as applied:
        expected = generate(pipe)
        table = applied.report.table
        with torch.autocast("cpu", torch.bfloat16):
            got = generate(pipe)
            assert applied.report.table == table
    assert not torch.equal(got.float(), expected)  # it was on
    with torch.autocast("cpu", torch.bfloat16):
        assert every_rule_acts(lambda: generate(pipe), pipe, RULES)
    distance = (got - expected).norm() / expected.norm()
    assert distance < 0.1 < (plain - expected).norm() / expected.norm()


def test_the_pipeline_changes_its_precision_under_a_policy(tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *RULES)):
        expected = generate(pipe)
        pipe.to(torch.bfloat16)
        coarse = generate(pipe)
        pipe.to(torch.float32)  # the weights keep what rounding left of them
        again = generate(pipe)
    assert (coarse.dtype, again.dtype) == (torch.bfloat16, torch.float32)
    distances = [((x - expected).norm() / expected.norm()).item() for x in (coarse.float(), again, plain)]
    assert max(distances[:2]) < 0.1 < distances[2]


def test_whole_run_in_inference_mode(tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *RULES)):
        expected = generate(pipe)
        with torch.inference_mode():
            assert torch.equal(generate(pipe), expected)
        assert torch.equal(generate(pipe), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert torch.equal(generate(pipe), plain)
