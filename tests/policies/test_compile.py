"""Under torch.compile a policy really acts, without graph breaks, and regionally without more graphs per scale."""

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from torch._dynamo.testing import CompileCounter

RULES = [
    Rule(blocks=[0], window=(0.5, 1), action=Reuse(every=2)),
    Rule(blocks=[1], window=(0.5, 1), action=Reuse(forecast="linear")),
    Rule(blocks=[2], window=(0.5, 1), action=Skip()),
    Rule(blocks=[3], branch="cond", action=ScaleText(operand="logit", scale=1.5)),
    Rule(blocks=[1], action=ScaleText(operand="input", scale=1.5)),
]


def generate(pipe) -> torch.Tensor:
    return pipe(
        "a cat",
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=4,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place", "by block"])
@pytest.mark.filterwarnings("default")
def test_compiled_model_obeys(tiny_sd3_pipeline, counter, how):
    pipe = tiny_sd3_pipeline()
    policy = BlockPolicy.for_model(pipe, "test", RULES)
    plain = generate(pipe)
    with apply_policy(pipe, policy):
        expected = generate(pipe)
    assert not torch.allclose(expected, plain, atol=1e-3)

    model = pipe.transformer
    if how == "wrapped":
        pipe.transformer = torch.compile(model, backend=counter, fullgraph=True)
    elif how == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        for block in model.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
    compiled_call = model._compiled_call_impl
    assert torch.equal(generate(pipe), plain)
    with apply_policy(pipe, policy) as applied:
        assert torch.equal(generate(pipe), expected)
        graphs = counter.frame_count
        assert torch.equal(generate(pipe), expected)
        assert counter.frame_count == graphs
    assert applied.report.skipped == 2
    assert torch.equal(generate(pipe), plain)
    assert counter.frame_count == graphs
    assert model._compiled_call_impl is compiled_call


@pytest.mark.filterwarnings("default")
def test_scales_do_not_recompile_blocks(tiny_sd3_pipeline, counter):
    pipe = tiny_sd3_pipeline(num_layers=8)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    generate(pipe)
    assert counter.frame_count == 2  # the last block is a kind of its own
    rules = [Rule(blocks=[b], action=ScaleText(operand="value", scale=1.1 + b / 10)) for b in range(8)]
    with apply_policy(pipe, BlockPolicy.for_model(pipe, "test", rules)):
        generate(pipe)
    assert counter.frame_count == 4


@pytest.mark.filterwarnings("default")
def test_compiling_under_a_policy_is_refused(tiny_sd3_pipeline, counter):
    pipe = tiny_sd3_pipeline()
    with apply_policy(pipe, BlockPolicy.for_model(pipe, "test", RULES)):
        pipe.transformer.compile(backend=counter, fullgraph=True)
        with pytest.raises((PolicyError, RuntimeError), match="compile it first, then apply the policy"):
            generate(pipe)
