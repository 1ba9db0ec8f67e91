"""Under every attention backend that runs here a policy acts, or diffusers or blocktune refuses in a sentence."""

from collections.abc import Iterator

import pytest
import torch
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from .models import FAMILY, every_rule_acts, new_scheduler, policy_for

OPERANDS = ["key", "value", "logit"]


@pytest.fixture(autouse=True)
def _one_backend_for_all() -> Iterator[None]:
    """diffusers keeps the backend that was set last as the one of every other model, too."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize("name", ["flux-dev", "flux2", "qwen-image"])
@pytest.mark.parametrize("operand", OPERANDS)
def test_native_backends_scale_text(name, operand):
    family = FAMILY[name]
    rule = Rule(blocks=[1], action=ScaleText(operand=operand, scale=1.7))
    outputs = []
    for backend in ("native", "_native_math"):
        model = family.build()
        model.set_attention_backend(backend)
        plain = family.forward(model)
        with apply_policy(model, policy_for(model, rule)):
            outputs.append(family.forward(model))
        assert not torch.allclose(outputs[-1], plain, atol=1e-3)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", ["flux-dev", "wan"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_refused_inside_of_attention_and_serves_all_else(name):
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    rules = [
        Rule(blocks=[0], action=ScaleText(operand="input", scale=1.7, scope="local")),
        Rule(blocks=[1], window=(0.5, 1), action=Skip()),
        Rule(blocks=[2], action=Reuse(every=2)),
    ]
    policy = policy_for(model, *rules)
    with apply_policy(model, policy, scheduler=scheduler):
        expected = family.denoise(model, scheduler)
    model.set_attention_backend("flex")
    plain = family.denoise(model, scheduler)
    with apply_policy(model, policy, scheduler=scheduler):
        torch.testing.assert_close(family.denoise(model, scheduler), expected)
    acting = rules if name == "wan" else rules[1:]  # blocks of FLUX norm their text: they hear no change of its size
    assert every_rule_acts(lambda: torch.stack(family.denoise(model, scheduler)), model, acting, scheduler=scheduler)

    for operand in OPERANDS if family.hears("logit") else OPERANDS[:2]:
        rule = Rule(blocks=[1], action=ScaleText(operand=operand, scale=1.7))
        with (
            apply_policy(model, policy_for(model, rule)),
            pytest.raises(PolicyError, match="use attention backend 'native' and the model's own attention processors"),
        ):
            family.forward(model)
    torch.testing.assert_close(family.denoise(model, scheduler), plain)


def test_a_backend_that_cannot_run_here_fails_as_without_a_policy():
    family = FAMILY["flux-dev"]
    model = family.build()
    model.set_attention_backend("_native_efficient")
    with pytest.raises(RuntimeError, match="No viable backend"):
        family.forward(model)
    rule = Rule(blocks=[1], action=ScaleText(operand="value", scale=1.7))
    with apply_policy(model, policy_for(model, rule)), pytest.raises(RuntimeError, match="No viable backend"):
        family.forward(model)
