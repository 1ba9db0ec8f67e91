"""Which tokens are the prompt's, or a phrase's, found by the tokenizers of Stable Diffusion 3, FLUX.1 and Qwen-Image.

Where they are is found here by spelling the prompt as far as the phrase, and as far as its end.
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Rule, ScaleText, apply_policy
from diffusers import AuraFlowPipeline, ChromaPipeline, FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline
from transformers import ByT5Tokenizer

from .by_hand import BRANCHES, changed, scaled_text
from .families import FAMILIES, Family
from .pipelines import CLIP_TOKENS, LONGEST, STEPS, autoencoder, flux_pipeline, generate, t5_encoder, t5_tokenizer

FAMILY = {family.name: family for family in FAMILIES}
OPERANDS = [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]
# Each tokenizer whose tokens the blocks see: where the first token of a prompt stands in the text, and how many fit.
# CLIP has a mark at either end, and both CLIPs spell alike; T5 has one at its end.
TOKENIZERS = {
    "sd3": {"tokenizer": (1, CLIP_TOKENS - 2), "tokenizer_3": (CLIP_TOKENS, LONGEST - 1)},
    "flux-dev": {"tokenizer_2": (0, LONGEST - 1)},
    "qwen-image": {"tokenizer": (0, LONGEST)},
}
EMBEDDINGS = {  # what calls take instead of a prompt, by its place in what `encode_prompt` returns
    "sd3": {"prompt_embeds": 0, "pooled_prompt_embeds": 2},
    "flux-dev": {"prompt_embeds": 0, "pooled_prompt_embeds": 1},
    "qwen-image": {"prompt_embeds": 0},
}


def text_length(pipe: Any, family: Family, prompts: list[str]) -> int:
    if family.name != "qwen-image":
        return LONGEST + (CLIP_TOKENS if family.name == "sd3" else 0)
    _, end = template(pipe)
    return min(max(len(pipe.tokenizer.tokenize(prompt + end)) for prompt in prompts), LONGEST)


def template(pipe: Any) -> tuple[str, str]:
    """What Qwen-Image puts in front of a prompt, and does not show to the blocks, and behind it, which it shows."""
    start, _, end = pipe.prompt_template_encode.partition("{}")
    return start, end


def factors_at(
    pipe: Any, family: Family, prompts: list[str], spans: list[list[tuple[int, int]]], scale: float
) -> torch.Tensor:
    """(prompts, text tokens): `scale` at the tokens of these characters of each prompt, 1 elsewhere."""
    factors = torch.ones(len(prompts), text_length(pipe, family, prompts))
    for row, prompt, parts in zip(factors, prompts, spans, strict=True):
        for name, (start, longest) in TOKENIZERS[family.name].items():
            tokenize = getattr(pipe, name).tokenize
            for begin, end in parts:
                before, through = len(tokenize(prompt[:begin].rstrip())), len(tokenize(prompt[:end]))
                row[start + before : start + min(through, longest)] = scale
    return factors


def factors_of(
    pipe: Any, family: Family, prompts: list[str], tokens: str | tuple[str, ...], scale: float
) -> torch.Tensor:
    """(prompts, text tokens): `scale` at the tokens named, 1 elsewhere."""
    spans = [
        [(prompt.index(part), prompt.index(part) + len(part)) for part in ([prompt] if tokens == "prompt" else tokens)]
        for prompt in prompts
    ]
    return factors_at(pipe, family, prompts, spans, scale)


def policy_for(pipe: Any, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(pipe, "test", rules)


@pytest.fixture(scope="module", params=["sd3", "flux-dev", "qwen-image"])
def spelling(request, tiny_sd3_t5_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline):
    """A pipeline and its family."""
    pipes = {"sd3": tiny_sd3_t5_pipeline, "flux-dev": tiny_flux_pipeline, "qwen-image": tiny_qwen_image_pipeline}
    return pipes[request.param], FAMILY[request.param]


def test_words_are_of_several_tokens_and_the_template_of_its_real_length(spelling):
    """Or tests of positions would say little."""
    pipe, family = spelling
    for name in TOKENIZERS[family.name]:
        assert len(getattr(pipe, name).tokenize("a red cat")) > 3
    if family.name == "qwen-image":
        assert len(pipe.tokenizer.tokenize(template(pipe)[0])) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize(("operand", "scope"), OPERANDS)
@pytest.mark.parametrize("tokens", ["prompt", ("red cat",), ("cat", "a")], ids=["prompt", "phrase", "phrases"])
def test_tokens_of_the_prompt(spelling, monkeypatch, operand, scope, tokens):
    """And of no other: the whole text scaled by as much is something else."""
    (pipe, family), scale = spelling, 0.0 if operand == "logit" else 3.0
    for index in {0, len(family.slots) - 1}:
        action = ScaleText(operand=operand, scope=scope, scale=scale, tokens=tokens)
        with apply_policy(pipe, policy_for(pipe, Rule(blocks=[index], action=action))) as applied:
            got = generate(pipe)
        assert applied.report.scaled == STEPS
        factors = factors_of(pipe, family, ["a red cat"], tokens, scale)
        with scaled_text(monkeypatch, pipe.transformer, family, index, operand, scope, factors):
            torch.testing.assert_close(got, generate(pipe), rtol=1e-3, atol=1e-3)
        if operand != "input":
            everything = torch.full_like(factors, scale)
            with scaled_text(monkeypatch, pipe.transformer, family, index, operand, scope, everything):
                assert not torch.allclose(got, generate(pipe), atol=1e-2)
            assert not torch.allclose(got, generate(pipe), atol=1e-2)


@pytest.mark.parametrize("tokens", ["prompt", ("red cat",)], ids=["prompt", "phrase"])
def test_each_row_has_the_tokens_of_its_own_prompt(spelling, monkeypatch, tokens):
    """Two prompts, two pictures each, then another prompt under the same policy."""
    pipe, family = spelling
    action = ScaleText(operand="value", scale=3.0, tokens=tokens)
    runs = [(["a red cat", "my red cat"], 2), (["our red cat"], 1), (["a red cat"], 1)]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = [generate(pipe, prompt=prompts, num_images_per_prompt=n) for prompts, n in runs]
    for output, (prompts, n) in zip(got, runs, strict=True):
        factors = factors_of(pipe, family, prompts, tokens, 3.0).repeat_interleave(n, dim=0)
        with scaled_text(monkeypatch, pipe.transformer, family, 1, "value", None, factors):
            expected = generate(pipe, prompt=prompts, num_images_per_prompt=n)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operand", ["key", "value", "logit"])
@pytest.mark.parametrize(
    ("branch", "tokens"), [("cond", ("red cat",)), ("both", ("red cat",)), ("uncond", "prompt"), ("both", "prompt")]
)
def test_each_branch_has_the_tokens_of_its_own_prompt(spelling, monkeypatch, operand, branch, tokens):
    """In a call of its own, or in a half of a call that holds both; the negative prompt need not hold a phrase."""
    pipe, family = spelling
    action = ScaleText(operand=operand, scale=3.0, tokens=tokens)
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], branch=branch, action=action))):
        got = generate(pipe, guided=True)
    factors = {}
    for called, prompt in zip(BRANCHES, ("a red cat", "a dog"), strict=True):
        spoken = branch in (called, "both") and (called == "cond" or tokens == "prompt")
        factors[called] = factors_of(pipe, family, [prompt], tokens if spoken else (), 3.0)
    batched = family.name == "sd3"
    if batched:  # unconditional rows first
        factors = dict.fromkeys(BRANCHES, torch.cat([factors["uncond"], factors["cond"]]))

    def change(step: int, called: str) -> AbstractContextManager:
        return scaled_text(monkeypatch, pipe.transformer, family, 1, operand, None, factors[called])

    with changed(pipe, not batched, change):
        torch.testing.assert_close(got, generate(pipe, guided=True), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, generate(pipe, guided=True), atol=1e-2)


def test_a_phrase_is_whole_words_wherever_they_stand(spelling, monkeypatch):
    pipe, family = spelling
    action = ScaleText(operand="value", scale=3.0, tokens=("cat",))
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = generate(pipe, prompt="cat scat cat")
        with pytest.raises(PolicyError, match="'cat'"):
            generate(pipe, prompt="a scat")
    factors = factors_at(pipe, family, ["cat scat cat"], [[(0, 3), (9, 12)]], 3.0)
    with scaled_text(monkeypatch, pipe.transformer, family, 1, "value", None, factors):
        torch.testing.assert_close(got, generate(pipe, prompt="cat scat cat"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", ["prompt", ("red cat",)], ids=["prompt", "phrase"])
def test_a_prompt_too_long_for_one_encoder(spelling, monkeypatch, tokens):
    """CLIP cuts this one off behind `red`; its last token is its mark again."""
    pipe, family = spelling
    action = ScaleText(operand="value", scale=3.0, tokens=tokens)
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = generate(pipe, prompt="tiny big red cat")
    factors = factors_of(pipe, family, ["tiny big red cat"], tokens, 3.0)
    with scaled_text(monkeypatch, pipe.transformer, family, 1, "value", None, factors):
        torch.testing.assert_close(got, generate(pipe, prompt="tiny big red cat"), rtol=1e-3, atol=1e-3)


def test_the_prompt_is_that_of_the_encoder_whose_tokens_the_blocks_see(tiny_flux_pipeline, monkeypatch):
    """FLUX gives its second prompt to T5 and the first to CLIP, of which the blocks see no token."""
    pipe, family = tiny_flux_pipeline, FAMILY["flux-dev"]
    action = ScaleText(operand="value", scale=3.0, tokens="prompt")
    prompts = {"prompt": "a big red cat", "prompt_2": "a dog"}
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=action))):
        got = generate(pipe, **prompts)
    with scaled_text(
        monkeypatch, pipe.transformer, family, 1, "value", None, factors_of(pipe, family, ["a dog"], "prompt", 3.0)
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
    taken = inspect.signature(pipe.encode_prompt).parameters

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        arguments = {"prompt": prompt, "prompt_2": None, "prompt_3": None, "max_sequence_length": LONGEST}
        with torch.no_grad():
            encoded = pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in taken})
        return {name: encoded[place] for name, place in EMBEDDINGS[family.name].items()}

    before = encode("a big red cat")
    rule = Rule(blocks=[1], action=ScaleText(operand="value", scale=2.0, tokens=tokens))
    with apply_policy(pipe, policy_for(pipe, rule)):
        scaled = generate(pipe)
        with pytest.raises(PolicyError, match="Row 0 of the prompt embeddings did not come from"):
            generate(pipe, prompt=None, **before)
        assert torch.equal(generate(pipe, prompt=None, **encode("a red cat")), scaled)
        assert torch.equal(generate(pipe), scaled)


# --- where they cannot be located --------------------------------------------------------------------------------

PROMPT = Rule(blocks=[1], action=ScaleText(operand="value", scale=2.0, tokens="prompt"))


def test_pictures_among_the_text_are_refused(tiny_qwen_image_pipeline):
    pipe = QwenImageEditPipeline(**tiny_qwen_image_pipeline.components, processor=None)
    with pytest.raises(PolicyError, match="QwenImageEditPipeline encodes pictures along with the prompt"):
        apply_policy(pipe, policy_for(pipe, PROMPT))


@pytest.mark.parametrize(("kind", "family"), [(AuraFlowPipeline, "auraflow"), (ChromaPipeline, "chroma")])
def test_families_whose_tokens_are_not_known_are_refused(kind, family):
    pipe = kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=FAMILY[family].build(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    name = type(pipe.transformer).__name__
    with pytest.raises(PolicyError, match=f"can be located for SD3Transformer2DModel, .*, not for {name}"):
        apply_policy(pipe, policy_for(pipe, PROMPT))


def test_two_prompts_for_the_same_places_are_refused(tiny_sd3_t5_pipeline):
    pipe = tiny_sd3_t5_pipeline
    with apply_policy(pipe, policy_for(pipe, PROMPT)):
        with pytest.raises(PolicyError, match="prompt_2 differs from prompt, and their tokens share places"):
            generate(pipe, prompt="a red cat", prompt_2="a dog")
        generate(pipe, prompt="a red cat", prompt_2="a red cat")


def test_a_tokenizer_that_tells_no_offsets_is_refused():
    pipe, encoder = flux_pipeline(), t5_encoder()
    encoder.resize_token_embeddings(400)
    pipe.register_modules(tokenizer_2=ByT5Tokenizer(), text_encoder_2=encoder)
    with (
        apply_policy(pipe, policy_for(pipe, PROMPT)),
        pytest.raises(PolicyError, match="tokenizer_2 tells no offsets"),
    ):
        generate(pipe)
