"""The tokenizers know every word, and the trained pipeline loads and draws."""

import numpy as np
import torch
from blocktune.reference import load_pipeline
from blocktune.reference.pipeline import (
    CLIP_TOKENS,
    SAMPLING,
    T5_TOKENS,
    WORDS,
    new_clip_tokenizer,
    new_t5_tokenizer,
)
from blocktune.reference.prompts import requests_of
from blocktune.reference.scenes import KINDS, SIZE, prompt_of


def test_every_word_is_one_token() -> None:
    clip, t5 = new_clip_tokenizer(), new_t5_tokenizer()
    for word in WORDS:
        assert len(clip(word, add_special_tokens=False).input_ids) == 1, word
        assert len(t5(word, add_special_tokens=False).input_ids) == 1, word


def test_every_prompt_fits() -> None:
    longest = max((prompt_of(r) for kind in KINDS for r in requests_of(kind)), key=lambda text: len(text.split()))
    assert len(new_clip_tokenizer()(longest).input_ids) <= CLIP_TOKENS
    assert len(new_t5_tokenizer()(longest).input_ids) <= T5_TOKENS


def test_the_trained_pipeline_draws_the_same_picture_twice() -> None:
    pipe = load_pipeline()
    assert len(pipe.transformer.transformer_blocks) == 12

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        output = pipe("a photo of a red circle", generator=generator, return_dict=False, **SAMPLING)
        return np.asarray(output[0][0])

    first = draw()
    assert first.shape == (SIZE, SIZE, 3)
    assert first.std() > 5
    assert np.array_equal(first, draw())
