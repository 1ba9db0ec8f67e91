"""Crispness is high for true renderings and falls with every kind of damage."""

import numpy as np
import pytest
from blocktune.evaluators import get
from blocktune.reference.scenes import KINDS, render, sample_request, sample_scene
from scipy.ndimage import gaussian_filter


def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """True renderings `(count, h, w, 3)`, all kinds in turn, and how many objects each shows."""
    rng = np.random.default_rng(20261123)
    scenes = [sample_scene(sample_request(KINDS[i % len(KINDS)], rng), rng) for i in range(count)]
    return render(scenes).permute(0, 2, 3, 1).numpy(), np.array([len(scene) for scene in scenes])


IMAGES, OBJECTS = sample(240)


def score(images: np.ndarray) -> np.ndarray:
    return get("crispness").score(images, [""] * len(images))


def test_true_renderings_are_crisp_however_many_objects() -> None:
    scores = score(IMAGES)
    assert scores.mean() >= 0.98
    # a lone object whose outline falls between pixels may look blurred; it is rare, not absent
    assert (scores >= 0.9).mean() >= 0.97
    means = [scores[n == OBJECTS].mean() for n in (1, 2, 3, 4)]
    assert max(means) - min(means) < 0.03


def test_blur_costs_strictly_more_the_wider_it_is() -> None:
    means = [score(gaussian_filter(IMAGES, (0, sigma, sigma, 0))).mean() for sigma in (0, 0.5, 1, 2)]
    assert np.all(np.diff(means) < -0.05), means


def test_noise_costs_strictly_more_the_stronger_it_is() -> None:
    noise = np.random.default_rng(0).normal(size=IMAGES.shape)
    means = [score(np.clip(IMAGES + std * noise, 0, 1)).mean() for std in (0, 0.02, 0.05, 0.1)]
    assert np.all(np.diff(means) < -0.05), means


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.92, np.nan, np.inf, 1e30])
def test_frames_without_a_picture_score_nothing(fill: float) -> None:
    assert score(np.full((1, 48, 48, 3), fill, np.float32))[0] == pytest.approx(0, abs=1e-3)


def test_uniform_noise_scores_nothing() -> None:
    assert score(np.random.default_rng(0).random((20, 48, 48, 3))).max() < 0.01


def test_eight_bits_are_enough() -> None:
    assert np.abs(score((IMAGES * 255).round().astype(np.uint8)) - score(IMAGES)).max() < 0.03
