"""FLUX.1 and Qwen-Image through their own pipelines, and the tokens of a prompt in these and in Stable Diffusion 3.

Under true guidance these two call the transformer twice at each step: conditional, then unconditional.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import FluxImg2ImgPipeline
from torch import nn

from .by_hand import forward_as, identity, keeping_residuals, scaled_text
from .families import FAMILIES, Family

STEPS = 4
BRANCHES = ("cond", "uncond")
FAMILY = {family.name: family for family in FAMILIES}
guidance = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


@pytest.fixture(scope="module", params=["flux-dev", "qwen-image"])
def family(request) -> Family:
    return FAMILY[request.param]


@pytest.fixture(scope="module")
def pipe(family, tiny_flux_pipeline, tiny_qwen_image_pipeline):
    return tiny_flux_pipeline if family.name == "flux-dev" else tiny_qwen_image_pipeline


def generate(pipe, guided: bool = False, **kwargs: Any) -> torch.Tensor:
    """Latents (1, 16, 16) of FLUX and Qwen-Image, (1, 4, 8, 8) of Stable Diffusion 3."""
    defaults = {
        "prompt": "a red cat",
        "num_inference_steps": STEPS,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    if guided:
        defaults |= {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    elif hasattr(pipe, "prompt_template_encode"):
        defaults["true_cfg_scale"] = 1.0  # on by default
    return pipe(**defaults | kwargs).images


def policy_for(pipe, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(pipe, "test", rules)


@contextmanager
def changed(pipe, guided: bool, change: Callable[[int, str], AbstractContextManager]) -> Iterator[None]:
    """Each call of the transformer runs inside `change(step, branch)`."""
    original, calls = pipe.transformer.forward, itertools.count()

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        step, call = divmod(next(calls), 1 + guided)
        with change(step, BRANCHES[call]):
            return original(*args, **kwargs)

    with forward_as(pipe.transformer, by_hand):
        yield


def replaced(model: nn.Module, family: Family, forwards: dict[int, Callable[..., Any]]) -> AbstractContextManager:
    """The blocks compute these forwards meanwhile."""
    stack = ExitStack()
    for index, by_hand in forwards.items():
        stack.enter_context(forward_as(family.block(model, index), by_hand))
    return stack


def skipped_by_hand(model: nn.Module, family: Family, blocks: list[int]) -> AbstractContextManager:
    return replaced(model, family, {i: identity(family.block(model, i), family.slots[i][0]) for i in blocks})


def branches_of(rule: Rule) -> tuple[str, ...]:
    return BRANCHES if rule.branch == "both" else (rule.branch,)


# --- nothing to do -----------------------------------------------------------------------------------------------


@guidance
def test_no_rules_is_bit_identical(pipe, family, guided):
    plain = generate(pipe, guided)
    rules = [Rule(blocks=range(len(family.slots)), action=ScaleText(operand="value", scale=1, tokens="prompt"))]
    for policy in (policy_for(pipe), policy_for(pipe, *rules)):
        with apply_policy(pipe, policy) as applied:
            assert torch.equal(generate(pipe, guided), plain)
        report = applied.report
        assert report.table == (("compute",) * len(family.slots),) * (STEPS * (1 + guided))
        assert report.skipped == report.reused == report.scaled == 0


# --- skip --------------------------------------------------------------------------------------------------------


@guidance
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
def test_skip_is_an_identity_in_its_window_and_branch(pipe, family, guided, branch):
    """Without guidance, the only call of a step is the conditional one."""
    blocks = [1, len(family.slots) - 1]
    rule = Rule(blocks=blocks, window=(0.5, 1), branch=branch, action=Skip())
    ran = []
    handles = [
        family.block(pipe.transformer, index).register_forward_hook(lambda *_, index=index: ran.append(index))
        for index in range(len(family.slots))
    ]
    with apply_policy(pipe, policy_for(pipe, rule)) as applied:
        got = generate(pipe, guided)
    for handle in handles:
        handle.remove()

    def change(step: int, called: str) -> AbstractContextManager:
        acts = step >= STEPS // 2 and called in branches_of(rule)
        return skipped_by_hand(pipe.transformer, family, blocks) if acts else nullcontext()

    with changed(pipe, guided, change):
        assert torch.equal(got, generate(pipe, guided))
    acts = guided or branch != "uncond"
    assert torch.equal(got, generate(pipe, guided)) != acts

    table = [
        tuple(
            "skip" if index in blocks and step >= STEPS // 2 and called in branches_of(rule) else "compute"
            for index in range(len(family.slots))
        )
        for step in range(STEPS)
        for called in BRANCHES[: 1 + guided]
    ]
    assert applied.report.table == tuple(table)
    assert [call.step for call in applied.report.calls] == [s for s in range(STEPS) for _ in range(1 + guided)]
    assert ran == [index for row in table for index, entry in enumerate(row) if entry == "compute"]


# --- reuse -------------------------------------------------------------------------------------------------------


def reused_by_hand(pipe, family: Family, guided: bool, branch: str, blocks: list[int], reused: list[int]) -> Any:
    """Each branch keeps residuals of its own."""
    model = pipe.transformer
    forwards = {}
    for called in BRANCHES:
        acts = branch in ("both", called)
        kinds = ["reuse" if acts and step in reused else "compute" for step in range(STEPS)]
        forwards[called] = {
            index: keeping_residuals(family.block(model, index), family.slots[index][0], kinds) for index in blocks
        }
    with changed(pipe, guided, lambda step, called: replaced(model, family, forwards[called])):
        return generate(pipe, guided)


@guidance
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
@pytest.mark.parametrize(
    ("window", "every", "reused"), [((0, 1), 2, [1, 3]), ((0, 1), None, [1, 2, 3]), ((0.5, 1), None, [2, 3])]
)
def test_reuse_adds_the_last_residual_of_its_branch(pipe, family, guided, branch, window, every, reused):
    blocks = [0, len(family.slots) - 1]
    rule = Rule(blocks=blocks, window=window, branch=branch, action=Reuse(every=every))
    with apply_policy(pipe, policy_for(pipe, rule)) as applied:
        got = generate(pipe, guided)
        report = applied.report
        assert torch.equal(generate(pipe, guided), got)  # nothing of the first run is left in the second
    torch.testing.assert_close(got, reused_by_hand(pipe, family, guided, branch, blocks, reused), rtol=1e-4, atol=1e-4)
    table = [
        tuple(
            "reuse" if index in blocks and step in reused and called in branches_of(rule) else "compute"
            for index in range(len(family.slots))
        )
        for step in range(STEPS)
        for called in BRANCHES[: 1 + guided]
    ]
    assert report.table == tuple(table)
    assert torch.allclose(got, generate(pipe, guided), atol=1e-3) != (report.reused > 0)


def test_no_residual_outlives_its_run(pipe, family):
    """Runs without guidance, with it, of another batch and resolution, and failed in either call of a step."""
    policy = policy_for(pipe, Rule(blocks=range(len(family.slots)), action=Reuse(every=3)))
    with apply_policy(pipe, policy):
        fresh = {guided: generate(pipe, guided) for guided in (False, True)}

    def fail_at(call: int) -> Callable[..., None]:
        calls = itertools.count()

        def hook(*_: Any) -> None:
            if next(calls) == call:
                raise RuntimeError("out of memory")

        return hook

    with apply_policy(pipe, policy):
        for other in ({"prompt": ["a cat", "a red dog"]}, {"height": 24}, {"num_inference_steps": 3}):
            for guided in (True, False):
                negative = {"negative_prompt": ["a dog"] * 2} if guided and "prompt" in other else {}
                generate(pipe, guided, **other, **negative)
                assert torch.equal(generate(pipe, guided), fresh[guided])
        for call in (1, 2, 5):
            handle = pipe.transformer.norm_out.register_forward_hook(fail_at(call))
            with pytest.raises(RuntimeError, match="out of memory"):
                generate(pipe, guided=True)
            handle.remove()
            assert torch.equal(generate(pipe, guided=True), fresh[True])
            assert torch.equal(generate(pipe), fresh[False])


# --- steps -------------------------------------------------------------------------------------------------------


STARTED = {"image": torch.zeros(1, 3, 16, 16), "strength": 0.7, "num_inference_steps": 10}  # at step 3 of 10


@pytest.fixture(scope="module")
def image_to_image(tiny_flux_pipeline) -> FluxImg2ImgPipeline:
    pipe = FluxImg2ImgPipeline(**tiny_flux_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_image_to_image_starts_inside_the_windows(image_to_image):
    pipe, family, model = image_to_image, FAMILY["flux-dev"], image_to_image.transformer
    rules = [Rule(blocks=[1], window=(0.5, 1), action=Skip()), Rule(blocks=[2], action=Reuse(every=2))]
    with apply_policy(pipe, policy_for(pipe, *rules)) as applied:
        got = generate(pipe, **STARTED)
    kinds = ["compute", "reuse"] * 3 + ["compute"]
    assert [call.step for call in applied.report.calls] == [*range(3, 10)]
    assert [call.blocks[1] for call in applied.report.calls] == ["compute"] * 2 + ["skip"] * 5
    assert [call.blocks[2] for call in applied.report.calls] == kinds

    reused = {2: keeping_residuals(family.block(model, 2), family.slots[2][0], kinds)}
    skipped = {1: identity(family.block(model, 1), family.slots[1][0])}
    with changed(pipe, False, lambda call, _: replaced(model, family, reused | (skipped if call > 1 else {}))):
        torch.testing.assert_close(got, generate(pipe, **STARTED), rtol=1e-4, atol=1e-4)


def test_branches_that_a_pipeline_does_not_name_share_no_residuals(image_to_image):
    """FLUX's image-to-image pipeline calls twice at a step and does not say which call is which."""
    pipe, family = image_to_image, FAMILY["flux-dev"]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=Skip()))) as applied:
        got = generate(pipe, guided=True, **STARTED)
    assert applied.report.skipped == 14
    with changed(pipe, True, lambda *_: skipped_by_hand(pipe.transformer, family, [1])):
        assert torch.equal(got, generate(pipe, guided=True, **STARTED))
    model, kinds = pipe.transformer, ["compute", "reuse"] * 3 + ["compute"]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=Reuse(every=2)))) as applied:
        got = generate(pipe, guided=True, **STARTED)
    assert [call.branch for call in applied.report.calls] == [*BRANCHES] * 7
    forwards = {
        called: {1: keeping_residuals(family.block(model, 1), family.slots[1][0], kinds)} for called in BRANCHES
    }
    with changed(pipe, True, lambda _, called: replaced(model, family, forwards[called])):
        torch.testing.assert_close(got, generate(pipe, guided=True, **STARTED), rtol=1e-4, atol=1e-4)


@guidance
def test_windows_are_fractions_of_the_schedule_at_hand(pipe, family, guided):
    """A run with three steps, given by its noise levels, and then one with four, under one policy."""
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], window=(0.5, 1), action=Skip()))) as applied:
        generate(pipe, guided, sigmas=[1.0, 0.6, 0.2], num_inference_steps=3)
        shortened = applied.report
        generate(pipe, guided)
    column = [call.blocks[1] for call in shortened.calls]
    assert column == ["compute"] * 2 * (1 + guided) + ["skip"] * (1 + guided)
    column = [call.blocks[1] for call in applied.report.calls]
    assert column == ["compute"] * 2 * (1 + guided) + ["skip"] * 2 * (1 + guided)


# --- text --------------------------------------------------------------------------------------------------------

OPERANDS = [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]
LENGTH = 16  # of T5's text


def tokenizers_of(pipe) -> list[tuple[Any, int]]:
    """Each tokenizer whose tokens the blocks see, and where the first token of a prompt stands in the text."""
    if hasattr(pipe, "prompt_template_encode"):
        return [(pipe.tokenizer, 0)]
    return (
        [(pipe.tokenizer_2, 0)]
        if pipe.__class__.__name__.startswith("Flux")
        else [
            (pipe.tokenizer, 1),  # behind its mark of the start; both CLIPs spell alike
            (pipe.tokenizer_3, 12),
        ]
    )


def text_length(pipe, prompts: list[str]) -> int:
    if hasattr(pipe, "prompt_template_encode"):
        end = pipe.prompt_template_encode.partition("{}")[2]
        return max(len(pipe.tokenizer.tokenize(prompt)) for prompt in prompts) + len(pipe.tokenizer.tokenize(end))
    return LENGTH + (12 if hasattr(pipe, "tokenizer_3") else 0)


def factors_of(pipe, prompts: list[str], tokens: str | tuple[str, ...], scale: float) -> torch.Tensor:
    """(prompts, text tokens): `scale` at the tokens named, 1 elsewhere."""
    factors = torch.ones(len(prompts), text_length(pipe, prompts))
    for row, prompt in zip(factors, prompts, strict=True):
        for tokenizer, start in tokenizers_of(pipe):
            for part in [prompt] if tokens == "prompt" else tokens:
                at = prompt.index(part)
                before = len(tokenizer.tokenize(prompt[:at].rstrip()))
                row[start + before : start + len(tokenizer.tokenize(prompt[: at + len(part)]))] = scale
    return factors


@pytest.fixture(scope="module", params=["sd3", "flux-dev", "qwen-image"])
def spelling(request, tiny_sd3_t5_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline):
    """A pipeline and its family."""
    pipes = {"sd3": tiny_sd3_t5_pipeline, "flux-dev": tiny_flux_pipeline, "qwen-image": tiny_qwen_image_pipeline}
    return pipes[request.param], FAMILY[request.param]


def off(pipe) -> dict[str, float]:
    """What turns guidance off."""
    return {"guidance_scale": 1.0} if hasattr(pipe, "tokenizer_3") else {}


def test_words_are_of_several_tokens_and_the_template_of_its_real_length(spelling):
    """Or tests of positions would say little."""
    pipe, _ = spelling
    for tokenizer, _ in tokenizers_of(pipe):
        assert len(tokenizer.tokenize("a red cat")) > 3
    if hasattr(pipe, "prompt_template_encode"):
        start = pipe.prompt_template_encode.partition("{}")[0]
        assert len(pipe.tokenizer.tokenize(start)) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize(("operand", "scope"), OPERANDS)
@pytest.mark.parametrize("tokens", ["prompt", ("red cat",), ("cat", "a")], ids=["prompt", "phrase", "phrases"])
def test_tokens_of_the_prompt(spelling, monkeypatch, operand, scope, tokens):
    """And of no other: the whole text scaled by as much is something else."""
    (pipe, family), scale = spelling, 0.0 if operand == "logit" else 3.0
    for index in {0, len(family.slots) - 1}:
        action = ScaleText(operand=operand, scope=scope, scale=scale, tokens=tokens)
        with apply_policy(pipe, policy_for(pipe, Rule(blocks=[index], action=action))) as applied:
            got = generate(pipe, **off(pipe))
        assert applied.report.scaled == STEPS
        factors = factors_of(pipe, ["a red cat"], tokens, scale)
        with scaled_text(monkeypatch, pipe.transformer, family, index, operand, scope, factors):
            torch.testing.assert_close(got, generate(pipe, **off(pipe)), rtol=1e-3, atol=1e-3)
        if operand != "input":
            everything = torch.full_like(factors, scale)
            with scaled_text(monkeypatch, pipe.transformer, family, index, operand, scope, everything):
                assert not torch.allclose(got, generate(pipe, **off(pipe)), atol=1e-2)
            assert not torch.allclose(got, generate(pipe, **off(pipe)), atol=1e-2)


@pytest.mark.parametrize("tokens", ["prompt", ("red cat",)], ids=["prompt", "phrase"])
def test_each_row_has_the_tokens_of_its_own_prompt(spelling, monkeypatch, tokens):
    """Two prompts, two pictures each, then another prompt under the same policy."""
    pipe, family = spelling
    action = ScaleText(operand="value", scale=3.0, tokens=tokens)
    runs = [(["a red cat", "my red cat"], 2), (["our red cat"], 1), (["a red cat"], 1)]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = [generate(pipe, prompt=prompts, num_images_per_prompt=n, **off(pipe)) for prompts, n in runs]
    for output, (prompts, n) in zip(got, runs, strict=True):
        factors = factors_of(pipe, prompts, tokens, 3.0).repeat_interleave(n, dim=0)
        with scaled_text(monkeypatch, pipe.transformer, family, 1, "value", None, factors):
            expected = generate(pipe, prompt=prompts, num_images_per_prompt=n, **off(pipe))
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operand", ["key", "value", "logit"])
def test_tokens_of_the_conditional_branch(spelling, monkeypatch, operand):
    """In a call of its own, or in the second half of a call that holds both branches."""
    pipe, family = spelling
    action = ScaleText(operand=operand, scale=3.0, tokens=("red cat",))
    batched = hasattr(pipe, "tokenizer_3")
    guided = {"negative_prompt": "a dog", "guidance_scale": 4.0} if batched else {"guided": True}
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], branch="cond", action=action))):
        got = generate(pipe, **guided)
    factors = factors_of(pipe, ["a red cat"], ("red cat",), 3.0)
    if batched:
        factors = torch.cat([torch.ones_like(factors), factors])

    def change(step: int, called: str) -> AbstractContextManager:
        if called == "uncond":
            return nullcontext()
        return scaled_text(monkeypatch, pipe.transformer, family, 1, operand, None, factors)

    with changed(pipe, not batched, change):
        torch.testing.assert_close(got, generate(pipe, **guided), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, generate(pipe, **guided), atol=1e-2)


def test_the_prompt_is_that_of_the_encoder_whose_tokens_the_blocks_see(tiny_flux_pipeline, monkeypatch):
    """FLUX gives its second prompt to T5 and the first to CLIP, of which the blocks see no token."""
    pipe, family = tiny_flux_pipeline, FAMILY["flux-dev"]
    action = ScaleText(operand="value", scale=3.0, tokens="prompt")
    prompts = {"prompt": "a big red cat", "prompt_2": "a dog"}
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = generate(pipe, **prompts)
    with scaled_text(
        monkeypatch, pipe.transformer, family, 1, "value", None, factors_of(pipe, ["a dog"], "prompt", 3.0)
    ):
        torch.testing.assert_close(got, generate(pipe, **prompts), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", ["prompt", ("red cat",)], ids=["prompt", "phrase"])
def test_a_bare_transformer_knows_no_prompt(spelling, tokens):
    pipe, _ = spelling
    rule = Rule(blocks=[1], action=ScaleText(operand="value", scale=2.0, tokens=tokens))
    with pytest.raises(PolicyError, match="tokens"):
        apply_policy(pipe.transformer, policy_for(pipe, rule))


@pytest.mark.parametrize("tokens", ["prompt", ("red cat",)], ids=["prompt", "phrase"])
def test_embeddings_tell_their_prompt_only_where_they_were_made_under_the_policy(spelling, tokens):
    pipe, family = spelling
    names = {
        "flux-dev": ("prompt_embeds", "pooled_prompt_embeds"),
        "qwen-image": ("prompt_embeds",),
        "sd3": ("prompt_embeds", "", "pooled_prompt_embeds"),
    }[family.name]

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        lengths = {} if family.name == "qwen-image" else {"max_sequence_length": LENGTH}
        more = {"prompt_3": None, "prompt_2": None} if family.name == "sd3" else {}
        more |= {"prompt_2": None} if family.name == "flux-dev" else {}
        with torch.no_grad():
            encoded = pipe.encode_prompt(prompt, **more, **lengths, device=torch.device("cpu"))
        return {name: tensor for name, tensor in zip(names, encoded, strict=False) if name}

    before = encode("a big red cat")
    rule = Rule(blocks=[1], action=ScaleText(operand="value", scale=2.0, tokens=tokens))
    with apply_policy(pipe, policy_for(pipe, rule)):
        scaled = generate(pipe, **off(pipe))
        with pytest.raises(PolicyError, match="Row 0 of the prompt embeddings did not come from"):
            generate(pipe, prompt=None, **before, **off(pipe))
        assert torch.equal(generate(pipe, prompt=None, **encode("a red cat"), **off(pipe)), scaled)
        assert torch.equal(generate(pipe, **off(pipe)), scaled)
