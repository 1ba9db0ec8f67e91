"""Scenes fulfil what their prompts ask for, and prompts read back."""

import numpy as np
import pytest
import torch
from blocktune.reference.prompts import requests_of
from blocktune.reference.scenes import (
    COLORS,
    GAP,
    GROUND,
    KINDS,
    SIZE,
    Object,
    Request,
    prompt_of,
    read_prompt,
    render,
    sample_request,
    sample_scene,
)
from hypothesis import given, settings
from hypothesis import strategies as st

requests = st.builds(
    lambda kind, seed: sample_request(kind, np.random.default_rng(seed)), st.sampled_from(KINDS), st.integers(0, 2**32)
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_read_back_from_its_prompt(kind: str) -> None:
    for request in requests_of(kind):
        assert read_prompt(prompt_of(request)) == request


@given(requests)
@settings(max_examples=100)
def test_a_sampled_request_is_read_back_from_its_prompt(request_: Request) -> None:
    assert read_prompt(prompt_of(request_)) == request_
    assert read_prompt(prompt_of(request_).upper()) == request_


def test_a_sentence_of_another_world_asks_for_nothing() -> None:
    assert read_prompt("a photo of a bench").things == ()
    assert read_prompt("").things == ()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'triples'; accepted: single"):
        sample_request("triples", np.random.default_rng(0))


@given(requests, st.integers(0, 2**32))
@settings(max_examples=100)
def test_a_scene_fulfils_its_request_and_nothing_touches(request_: Request, seed: int) -> None:
    scene = sample_scene(request_, np.random.default_rng(seed))
    wanted = [thing for thing in request_.things for _ in range(thing.count)]
    assert [o.shape for o in scene] == [thing.shape for thing in wanted]
    assert all(thing.color in (None, o.color) for o, thing in zip(scene, wanted, strict=True))
    for i, a in enumerate(scene):
        assert a.radius <= min(a.x, a.y, SIZE - a.x, SIZE - a.y)
        for b in scene[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + GAP
    if request_.relation:
        dx, dy = scene[0].x - scene[1].x, scene[0].y - scene[1].y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[request_.relation]
        assert along > 0.7 * min(abs(dx), abs(dy))


def test_a_rendering_is_flat_colour_on_ground_and_deterministic() -> None:
    scene = [Object("square", "red", 14.0, 14.0, 7.0), Object("circle", "blue", 34.0, 30.0, 7.0)]
    image = render([scene, []])
    assert image.shape == (2, 3, SIZE, SIZE)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    torch.testing.assert_close(image[0, :, 14, 14], torch.tensor(COLORS["red"]))
    torch.testing.assert_close(image[0, :, 30, 34], torch.tensor(COLORS["blue"]))
    torch.testing.assert_close(image[1], torch.tensor(GROUND).view(3, 1, 1).expand(3, SIZE, SIZE))
    assert torch.equal(image, render([scene, []]))


def test_one_seed_gives_one_scene() -> None:
    def draw() -> list[Object]:
        rng = np.random.default_rng(7)
        return sample_scene(sample_request("counting", rng), rng)

    assert draw() == draw()
