"""Crispness is whole for true renderings and falls with every kind of damage."""

from itertools import pairwise

import numpy as np
import pytest
from blocktune.evaluators import get
from blocktune.reference.scenes import GROUND, KINDS, SHAPES, Object, render, sample_request, sample_scene
from scipy.ndimage import gaussian_filter


def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """True renderings `(count, h, w, 3)`, all kinds in turn, and how many objects each shows."""
    rng = np.random.default_rng(20261123)
    scenes = [sample_scene(sample_request(KINDS[i % len(KINDS)], rng), rng) for i in range(count)]
    return render(scenes).permute(0, 2, 3, 1).numpy(), np.array([len(scene) for scene in scenes])


IMAGES, OBJECTS = sample(600)


def score(images: np.ndarray) -> np.ndarray:
    return get("crispness").score(images, [""] * len(images))


def test_every_true_rendering_is_crisp_wherever_its_edges_lie_between_pixels() -> None:
    assert score(IMAGES).min() >= 0.98


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_an_object_by_parts_of_a_pixel_costs_nothing(shape: str) -> None:
    places = 20 + np.linspace(0, 1, 9)
    scenes = [[Object(shape, "red", x, y, radius)] for x in places for y in places for radius in (5.5, 6.2, 8.0)]
    assert score(render(scenes).permute(0, 2, 3, 1).numpy()).min() >= 0.98


def blurred(sigma: float) -> np.ndarray:
    return gaussian_filter(IMAGES, (0, sigma, sigma, 0))


def noisy(deviation: float) -> np.ndarray:
    return IMAGES + deviation * np.random.default_rng(0).normal(size=IMAGES.shape)


def tinted(shift: float) -> np.ndarray:
    return IMAGES + shift * np.array([1, -0.5, 0.3])


def haunted(strength: float) -> np.ndarray:
    """Another picture's objects shine faintly through the ground."""
    ground = np.abs(IMAGES - GROUND).max(-1, keepdims=True) < 0.02
    return np.where(ground, (1 - strength) * IMAGES + strength * np.roll(IMAGES, 1, axis=0), IMAGES)


DAMAGES = {
    "blur": (blurred, (0.5, 1.0, 2.0)),
    "noise": (noisy, (0.02, 0.05, 0.1)),
    "tint": (tinted, (0.02, 0.05, 0.1)),
    "ghosts": (haunted, (0.1, 0.2, 0.3)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_costs_clearly_and_more_the_stronger_it_is(kind: str) -> None:
    damage, strengths = DAMAGES[kind]
    means = [score(np.clip(damage(strength), 0, 1)).mean() for strength in strengths]
    assert means[0] < 0.85, means
    assert all(weaker > 1.3 * stronger for weaker, stronger in pairwise(means)), means


@pytest.mark.parametrize("kind", ["blur", "noise", "tint"])
def test_damage_costs_alike_however_many_objects_there_are(kind: str) -> None:
    damage, strengths = DAMAGES[kind]
    scores = score(np.clip(damage(strengths[0]), 0, 1))
    means = [scores[n == OBJECTS].mean() for n in (1, 2, 3, 4)]
    assert max(means) - min(means) < 0.1, means


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.92, np.nan, np.inf, 1e30])
def test_frames_without_a_picture_score_nothing(fill: float) -> None:
    assert score(np.full((1, 48, 48, 3), fill, np.float32))[0] == pytest.approx(0, abs=1e-3)


def test_uniform_noise_scores_nothing() -> None:
    assert score(np.random.default_rng(0).random((20, 48, 48, 3))).max() < 0.01


def test_eight_bits_are_enough() -> None:
    assert np.abs(score((IMAGES * 255).round().astype(np.uint8)) - score(IMAGES)).max() < 0.03
