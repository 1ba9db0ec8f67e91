"""Pipelines whose weights are offloaded obey a policy, whichever came first.

Everything is on one CPU. Sequential offload really takes the weights away (to the meta device) between uses; it is put
on the transformer alone, as `enable_sequential_cpu_offload` does, because on a CPU that fails in the text encoders,
policy or not. Model and group offload move weights from the CPU to the CPU: what is tested is that hooks meet, and that
the weights of a block are called for before it computes; transfers and streams are those of `test_on_cuda.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

from .models import FAMILY, OFFLOADED, every_rule_acts, generate, new_scheduler, policy_for


def group(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_device=torch.device("cpu"), **options)


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: cpu_offload(pipe.transformer, torch.device("cpu")),
    "group by block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
    "group by leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
}
by_offload = pytest.mark.parametrize("offload", OFFLOADS)


@pytest.fixture(scope="module")
def answers(tiny_sd3_pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents without a policy and with one, nothing offloaded."""
    pipe = tiny_sd3_pipeline()
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *OFFLOADED)):
        expected = generate(pipe)
    assert not torch.allclose(plain, expected, atol=1e-3)
    return plain, expected


@by_offload
def test_policy_on_an_offloaded_pipeline(tiny_sd3_pipeline, answers, offload):
    plain, expected = answers
    pipe = tiny_sd3_pipeline()
    OFFLOADS[offload](pipe)
    assert torch.equal(generate(pipe), plain)
    with apply_policy(pipe, policy_for(pipe, *OFFLOADED)) as applied:
        for _ in range(2):
            assert torch.equal(generate(pipe), expected)
            assert (applied.report.skipped, applied.report.reused) == (2, 2)
    assert torch.equal(generate(pipe), plain)
    assert every_rule_acts(lambda: generate(pipe), pipe, OFFLOADED)


@by_offload
@pytest.mark.parametrize("off_first", ["policy", "offload"])
def test_pipeline_offloaded_under_a_policy(tiny_sd3_pipeline, answers, offload, off_first):
    plain, expected = answers
    pipe = tiny_sd3_pipeline()
    blocks = list(pipe.transformer.transformer_blocks)
    applied = apply_policy(pipe, policy_for(pipe, *OFFLOADED))
    OFFLOADS[offload](pipe)
    for _ in range(2):
        assert torch.equal(generate(pipe), expected)
    if off_first == "policy":
        applied.remove()
        assert torch.equal(generate(pipe), plain)
        pipe.remove_all_hooks()
    else:
        pipe.remove_all_hooks()
        assert torch.equal(generate(pipe), expected)
        applied.remove()
    assert torch.equal(generate(pipe), plain)
    assert list(pipe.transformer.transformer_blocks) == blocks
    assert "_hf_hook" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", ["flux2", "wan"])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("first", ["offload", "policy"])
def test_weights_are_called_for_before_a_block_computes(monkeypatch, name, offload_type, first):
    """Wan's blocks own a parameter besides those of their layers."""
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    policy = policy_for(
        model,
        Rule(blocks=[0], window=(0, 0.5), action=Skip()),
        Rule(blocks=[1], action=Reuse(every=2)),
        Rule(blocks=[2], action=ScaleText(operand="value", scale=1.7)),
    )
    plain = family.denoise(model, scheduler)
    with apply_policy(model, policy, scheduler=scheduler):
        expected = family.denoise(model, scheduler)
    assert not any(map(torch.equal, expected, plain))

    here: dict[int, bool] = {}
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_
    monkeypatch.setattr(
        ModuleGroup, "onload_", lambda self: (here.update(dict.fromkeys(weights(self), True)), onload(self))
    )
    monkeypatch.setattr(
        ModuleGroup, "offload_", lambda self: (here.update(dict.fromkeys(weights(self), False)), offload(self))
    )

    def weights(group: ModuleGroup) -> list[int]:
        return [id(p) for p in group.parameters] + [id(p) for module in group.modules for p in module.parameters()]

    def look(layer: torch.nn.Module, *_: Any) -> None:
        assert all(here[id(parameter)] for parameter in layer.parameters(recurse=False))

    for layer in model.modules():  # the forward itself: diffusers' hooks have been called by then
        if isinstance(layer, torch.nn.Linear):
            original = layer.forward
            layer.forward = lambda x, layer=layer, original=original: (look(layer), original(x))[1]

    def offload_model() -> None:
        options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=offload_type, **options)

    if first == "offload":
        offload_model()
    applied = apply_policy(model, policy, scheduler=scheduler)
    if first == "policy":
        offload_model()
    for _ in range(2):
        assert all(map(torch.equal, family.denoise(model, scheduler), expected))
    applied.remove()
    assert all(map(torch.equal, family.denoise(model, scheduler), plain))
    assert here
    assert not any(here.values())


@pytest.mark.parametrize("action", [Skip(), Reuse(every=2)])
def test_leaving_out_a_block_that_moves_its_group_is_refused(tiny_sd3_pipeline, action):
    """Blocks 0 to 2 are one group: 0 loads its weights, 2 takes them away again."""
    pipe = tiny_sd3_pipeline()
    plain = generate(pipe)
    group(pipe, offload_type="block_level", num_blocks_per_group=3)
    for block in (0, 2):
        with (
            apply_policy(pipe, policy_for(pipe, Rule(blocks=[block], action=action))),
            pytest.raises(
                PolicyError, match=rf"rules\[0\] leaves out block {block}, which moves the weights of a group"
            ),
        ):
            generate(pipe)
    for block in (1, 3):
        with apply_policy(pipe, policy_for(pipe, Rule(blocks=[block], action=action))):
            assert not torch.equal(generate(pipe), plain)
    scaled = Rule(blocks=[0, 2], action=ScaleText(operand="value", scale=1.7))
    with apply_policy(pipe, policy_for(pipe, scaled)):
        assert not torch.equal(generate(pipe), plain)
