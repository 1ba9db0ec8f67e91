"""Compiled models obey a policy: no graph break, and no more graphs than patterns of actions."""

import pytest
import torch
from blocktune.policies import Reuse, Rule, ScaleText, Skip, apply_policy
from torch import nn
from torch._dynamo.testing import CompileCounter

from ..families import STEPS, Family
from .models import FAMILY, new_scheduler, policy_for

# Blocks and calls are another family's; what differs lies outside of them, and each takes seconds to compile.
SAME_BLOCKS = ("flux-schnell", "flux-kontext", "flux-fill", "flux2-klein", "hunyuan-image-glyphs")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def rules_for(family: Family) -> list[Rule]:
    """Four patterns of actions in the four steps of a run."""
    last = len(family.slots) - 1
    rules = [
        Rule(blocks=[1], window=(0.5, 1), action=Skip()),
        Rule(blocks=[0], window=(0.25, 1), action=Reuse(every=2)),
    ]
    texts = [
        Rule(blocks=[last], action=ScaleText(operand="value", scale=1.7)),
        Rule(blocks=[last], window=(0.75, 1), action=ScaleText(operand="key", scale=0.5)),
        Rule(blocks=[1], window=(0, 0.5), action=ScaleText(operand="input", scale=1.5, scope="local")),
    ]
    return rules + texts if family.hears("value") else rules


def obeys(model: nn.Module, family: Family, counter: CompileCounter, regional: bool) -> tuple[int, int]:
    """Graphs that the compiled model took without a policy and more that it took under one."""
    scheduler = new_scheduler()
    plain = family.denoise(model, scheduler)
    policy = policy_for(model, *rules_for(family))
    with apply_policy(model, policy, scheduler=scheduler) as applied:
        expected, table = family.denoise(model, scheduler), applied.report.table
    for step, (a, b) in enumerate(zip(plain, expected, strict=True)):  # nothing is skipped or reused in the first
        assert torch.allclose(a, b, atol=1e-3) == (step < 1 and not family.hears("value"))

    called = model
    if regional:
        repeated = model._repeated_blocks or []  # as diffusers lists them; it leaves some out
        if repeated:
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for block in (family.block(model, index) for index in range(len(family.slots))):
            if type(block).__name__ not in repeated:
                block.compile(backend=counter, fullgraph=True)
    else:
        called = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(family.denoise(called, scheduler), plain)
    graphs = counter.frame_count
    with apply_policy(called, policy, scheduler=scheduler) as applied:
        torch.testing.assert_close(family.denoise(called, scheduler), expected)
        assert applied.report.table == table
        more = counter.frame_count - graphs
        torch.testing.assert_close(family.denoise(called, scheduler), expected)
    torch.testing.assert_close(family.denoise(called, scheduler), plain)
    assert counter.frame_count == graphs + more  # the second run, and the one without a policy, took none
    return graphs, more


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "wan"])
@pytest.mark.filterwarnings("default")
def test_whole_model_obeys_with_one_graph_for_each_pattern(counter, name):
    family = FAMILY[name]
    graphs, more = obeys(family.build(), family, counter, regional=False)
    assert (graphs, more) == (1, STEPS)


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in SAME_BLOCKS])
@pytest.mark.filterwarnings("default")
def test_compiled_blocks_obey(counter, name):
    """Skip, reuse and scaled inputs take no graph; keys and values inside of a block take one each."""
    family = FAMILY[name]
    _, more = obeys(family.build(), family, counter, regional=True)
    assert more == (2 if family.hears("value") else 0)


@pytest.mark.parametrize("name", ["flux2", "qwen-image"])
@pytest.mark.filterwarnings("default")
def test_many_windows_and_scales_take_no_more_graphs_than_kinds_of_blocks(counter, name):
    family, scheduler = FAMILY[name], new_scheduler()
    model = family.build()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    family.denoise(model, scheduler)
    before = counter.frame_count
    rules = [
        Rule(blocks=[block], window=(start, start + 0.25), action=ScaleText(operand="value", scale=1.1 + start + block))
        for block in range(len(family.slots))
        for start in (0, 0.25, 0.5, 0.75)
    ]
    with apply_policy(model, policy_for(model, *rules), scheduler=scheduler):
        family.denoise(model, scheduler)
    assert counter.frame_count == before + len(family.containers)


@pytest.mark.filterwarnings("default")
def test_inductor_obeys():
    """The default compiler itself, on one double-stream and one single-stream block."""
    torch._dynamo.reset()
    family, scheduler = FAMILY["flux-dev"], new_scheduler()
    model = family.build()
    del model.transformer_blocks[1:], model.single_transformer_blocks[1:]
    rules = [
        Rule(blocks=[0], window=(0.5, 1), action=Skip()),
        Rule(blocks=[1], action=ScaleText(operand="logit", scale=1.7)),
    ]
    policy = policy_for(model, *rules)
    plain = family.denoise(model, scheduler)
    with apply_policy(model, policy, scheduler=scheduler):
        expected = family.denoise(model, scheduler)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, expected, strict=True))
    model.transformer_blocks[0].compile(fullgraph=True)
    model.single_transformer_blocks[0].compile(fullgraph=True)
    torch.testing.assert_close(family.denoise(model, scheduler), plain)
    with apply_policy(model, policy, scheduler=scheduler):
        torch.testing.assert_close(family.denoise(model, scheduler), expected)
    torch._dynamo.reset()
