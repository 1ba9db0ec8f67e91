"""The same pictures whether a pipeline is given prompts or what `embed` made of them, for each family of pipelines."""

import numpy as np
import pytest
import torch
from blocktune.evaluators import Prompt
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.search.config import Generation
from blocktune.search.generation import embed, generate
from diffusers import StableDiffusion3Pipeline

from ..policies.pipelines import flux_pipeline, qwen_image_pipeline

PROMPTS = [Prompt("a red cat", "", 3), Prompt("a dog", "", 4), Prompt("a", "", 5)]
SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}


class Unknown(StableDiffusion3Pipeline):
    """A pipeline class whose embeddings are not known."""


@pytest.fixture(scope="module", params=["sd3", "flux", "qwen", "unknown"])
def pipe(request, tiny_sd3_pipeline):
    if request.param in ("flux", "qwen"):
        return flux_pipeline() if request.param == "flux" else qwen_image_pipeline()
    pipe = tiny_sd3_pipeline()
    return pipe if request.param == "sd3" else Unknown(**pipe.components)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_embeddings_stand_for_prompts(pipe, guidance):
    pipe.set_progress_bar_config(disable=True)
    generation = Generation(num_inference_steps=3, guidance_scale=guidance, batch=2, **SIZE)
    texts = [p.text for p in PROMPTS]
    images = generate(pipe, PROMPTS, embed(pipe, texts, generation), generation)
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.uint8
    name = "true_cfg_scale" if type(pipe).__name__.startswith("Qwen") else "guidance_scale"
    negative = {"negative_prompt": [" "]} if name == "true_cfg_scale" and guidance > 1 else {}
    for prompt, image in zip(PROMPTS, images, strict=True):
        direct = pipe(
            [prompt.text], num_inference_steps=3, generator=torch.Generator().manual_seed(prompt.seed),
            output_type="np", **SIZE, **{name: guidance}, **negative,
        ).images[0]  # fmt: skip
        assert np.abs((direct * 255).round().astype(int) - image).max() <= 1


def test_a_policy_acts(pipe):
    generation = Generation(num_inference_steps=3, batch=3, **SIZE)
    rows = embed(pipe, [p.text for p in PROMPTS], generation)
    policy = BlockPolicy.for_model(pipe, "skip", [Rule(blocks=[1], action=Skip())])
    plain = generate(pipe, PROMPTS, rows, generation)
    assert not np.array_equal(generate(pipe, PROMPTS, rows, generation, policy), plain)
    assert np.array_equal(generate(pipe, PROMPTS, rows, generation), plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("at_a_time", [1, 2, 4])
def test_texts_are_encoded_a_few_at_a_time(pipe, guidance, at_a_time, monkeypatch):
    """As all at once, whether they are as long as each other or not; a split of prompts would not fit on a GPU."""
    generation = Generation(guidance_scale=guidance, max_sequence_length=64)
    for texts in (["a red circle"] * 5, ["a", "two blue squares above a ring", "a", "a", "one red circle and a star"]):
        monkeypatch.setattr("blocktune.search.generation._TEXTS", 99)
        whole = embed(pipe, texts, generation)
        monkeypatch.setattr("blocktune.search.generation._TEXTS", at_a_time)
        parts = embed(pipe, texts, generation)
        assert whole.keys() == parts.keys()
        for name, rows in whole.items():
            if isinstance(rows, list):
                assert rows == parts[name] == ([" "] * 5 if "negative" in name else texts)
            else:
                torch.testing.assert_close(parts[name], rows, rtol=0, atol=1e-5)
