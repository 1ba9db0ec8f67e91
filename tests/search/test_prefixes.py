"""Pictures are the same to the last bit whether runs share their beginnings or not."""

import numpy as np
import pytest
import torch
from blocktune.evaluators import Prompt
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from blocktune.search.config import Generation
from blocktune.search.generation import embed, generate
from blocktune.search.outputs import Outputs
from blocktune.search.prefixes import Prefixes
from diffusers import FlowMatchHeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ..policies.pipelines import flux_pipeline, qwen_image_pipeline

PROMPTS = [Prompt("a red cat", "", 3), Prompt("a dog", "", 4), Prompt("a", "", 5)]
STEPS = 8
GENEROUS = 1.0


@pytest.fixture(scope="module", params=["sd3", "flux", "qwen"])
def maker(request, tiny_sd3_pipeline):
    """`make(rules, prefixes)`: pixels and latents of three pictures in two batches.

    Guided in one call of the transformer (SD3) or in two (Qwen-Image), or by an input of it (FLUX.1).
    """
    pipe = {"sd3": tiny_sd3_pipeline, "flux": flux_pipeline, "qwen": qwen_image_pipeline}[request.param]()
    generation = Generation(guidance_scale=4.0, batch=2, height=16, width=16, max_sequence_length=16)
    rows = embed(pipe, [p.text for p in PROMPTS], generation)
    latents = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: (latents.append(z.clone()), decode(z, *args, **kwargs))[1]

    def make(rules=(), prefixes=None, steps=STEPS, prompts=PROMPTS, guidance=4.0, window=(0.0, 1.0)):
        policy = BlockPolicy.for_model(pipe, "one", list(rules), guidance_window=window)
        latents.clear()
        guided = generation.model_copy(update={"guidance_scale": guidance, "num_inference_steps": steps})
        images = generate(pipe, prompts, rows, guided, policy, prefixes)
        return images, torch.cat(latents)

    make.pipe = pipe
    return make


def late(action, start, block=1):
    return Rule(blocks=[block], window=(start, 1.0), action=action)


def check(make, prefixes, rules=(), **kwargs):
    """The share of steps that were given, the pictures being right."""
    taken, known = prefixes.steps, prefixes.given
    images, latents = make(rules, prefixes, **kwargs)
    alone, alone_latents = make(rules, **kwargs)
    assert np.array_equal(images, alone)
    assert torch.equal(latents, alone_latents)
    return (prefixes.given - known) / max(1, prefixes.steps - taken)


def test_a_policy_begins_where_it_first_acts(maker):
    prefixes = Prefixes(Outputs(GENEROUS))
    assert check(maker, prefixes) == 0
    assert check(maker, prefixes) == 1
    assert check(maker, prefixes, [late(Skip(), 0.5)]) == 4 / 8
    # the step before the window keeps the residual, so it has to run
    assert check(maker, prefixes, [late(Reuse(every=2), 0.5)]) == 3 / 8
    # and for a forecast the one before as well
    assert check(maker, prefixes, [late(Reuse(every=2, forecast="linear"), 0.5)]) == 2 / 8
    assert check(maker, prefixes, [late(Skip(), 0.0)]) == 0
    assert check(maker, prefixes, [late(Reuse(every=3), 0.0)]) == 0
    assert check(maker, prefixes, steps=6) == 0  # another schedule
    assert check(maker, prefixes, prompts=PROMPTS[::-1]) == 0  # other pictures


def test_guidance_in_a_part_of_the_run_is_shared_up_to_its_end(maker):
    prefixes = Prefixes(Outputs(GENEROUS))
    check(maker, prefixes)
    reuse = [late(Reuse(), 0.25)]  # from step 2, a residual of step 1
    assert check(maker, prefixes, window=(0.0, 0.5)) == 4 / 8
    assert check(maker, prefixes, window=(0.0, 0.75)) == 6 / 8
    assert check(maker, prefixes, reuse, window=(0.0, 0.5)) == 1 / 8
    assert check(maker, prefixes, reuse, window=(0.0, 0.5)) == 1
    assert check(maker, prefixes, window=(0.25, 1.0)) == 0


def test_another_guidance_shares_nothing(maker):
    prefixes = Prefixes(Outputs(GENEROUS))
    skip = [late(Skip(), 0.5)]
    for guidance in (4.0, 6.0):
        assert check(maker, prefixes, guidance=guidance) == 0
        assert check(maker, prefixes, skip, guidance=guidance) == 4 / 8
    assert check(maker, prefixes, skip) == 1
    images = [maker(skip, prefixes, guidance=guidance)[1] for guidance in (4.0, 6.0)]
    assert not torch.equal(*images)


def test_two_policies_share_what_they_both_do(maker):
    prefixes = Prefixes(Outputs(GENEROUS))
    louder = Rule(blocks=[0], action=ScaleText(operand="value", scale=1.5))
    check(maker, prefixes, [louder, late(Skip(), 0.75)])
    assert check(maker, prefixes, [louder, late(Skip(), 0.5)]) == 4 / 8
    assert check(maker, prefixes, [louder, late(Skip(), 0.75)]) == 1
    quieter = Rule(blocks=[0], action=ScaleText(operand="value", scale=1.4))
    assert check(maker, prefixes, [quieter, late(Skip(), 0.75)]) == 0


@pytest.mark.parametrize(
    ("reuse", "parts", "given"),
    [
        (Reuse(every=3), 0.5, 4),  # step 1 makes what 2 and 3 reuse, and step 4 what comes then
        (Reuse(every=3), 0.375, 2),  # step 3 reuses what step 1 made, which is computed again; 0 and 2 are not
        (Reuse(every=3), 0.625, 4),  # step 4 made it
        (Reuse(), 0.75, 5),  # step 1 made all that comes
        (Reuse(every=2, forecast="linear"), 0.5, 2),  # step 4 follows the line through what 1 and 3 made
    ],
)
def test_a_step_is_computed_again_where_its_residual_is_reused_by_another(maker, reuse, parts, given):
    """Two policies part in the middle of what block 1 reuses; of their common steps those count that make residuals."""
    prefixes = Prefixes(Outputs(GENEROUS))
    first = [late(reuse, 0.25)]
    check(maker, prefixes, first)
    both = [*first, late(Skip(), parts, block=2)]
    assert check(maker, prefixes, both) == given / 8
    assert check(maker, prefixes, both) == 1
    assert check(maker, prefixes, first) == 1


def test_what_is_reused_in_one_is_told_from_what_is_reused_block_by_block(maker):
    """Neighbours that reuse alike keep one residual, which rounds differently; one that parts keeps its own."""
    prefixes = Prefixes(Outputs(GENEROUS))
    alike = [Rule(blocks=[1, 2], window=(0.25, 1.0), action=Reuse())]
    check(maker, prefixes, alike)
    parted = [Rule(blocks=[1, 2], window=(0.25, 0.75), action=Reuse()), late(Reuse(), 0.75, block=1)]
    assert check(maker, prefixes, parted) == 1 / 8  # step 1 makes the residuals


rules = st.builds(
    lambda blocks, action, start: Rule(blocks=sorted(blocks), window=(start, 1.0), action=action),
    st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    st.sampled_from(
        [
            Skip(),
            Reuse(every=2),
            Reuse(every=3),
            Reuse(),
            Reuse(every=2, forecast="linear"),
            Reuse(forecast="linear"),
            ScaleText(operand="key", scale=1.5),
        ]
    ),
    st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.6, 0.75]),
)


def disjoint(rules):
    blocks = [block for rule in rules for block in rule.blocks]
    return len(blocks) == len(set(blocks))


@settings(max_examples=5, derandomize=True)
@given(
    policies=st.lists(st.lists(rules, max_size=3).filter(disjoint), min_size=2, max_size=3),
    gib=st.sampled_from([GENEROUS, 20_000 / 2**30, 0.0]),
)
def test_any_order_of_policies_in_any_memory(maker, policies, gib):
    prefixes = Prefixes(Outputs(gib))
    for one in policies:
        check(maker, prefixes, one)
        assert 0 <= prefixes.outputs.room <= prefixes.outputs.size
    assert gib or not prefixes.given


@pytest.mark.parametrize("maker", ["sd3"], indirect=True)  # the others' schedules are not Heun's
def test_a_scheduler_that_remembers(maker):
    """Heun's second order steps from what it kept of the first: the schedulers run as ever."""
    before = maker.pipe.scheduler
    maker.pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(before.config)
    try:
        prefixes = Prefixes(Outputs(GENEROUS))
        check(maker, prefixes)
        assert check(maker, prefixes, [late(Skip(), 0.5)]) > 0.4
    finally:
        maker.pipe.scheduler = before


def test_a_run_that_fails_leaves_nothing(maker):
    prefixes = Prefixes(Outputs(GENEROUS))
    torch_forward = maker.pipe.transformer.forward
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return torch_forward(*args, **kwargs)

    maker.pipe.transformer.forward = broken
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            maker((), prefixes)
    finally:
        del maker.pipe.transformer.forward
    assert maker.pipe.transformer._compiled_call_impl is None
    assert not prefixes.outputs.plain
    assert check(maker, prefixes) == 0
