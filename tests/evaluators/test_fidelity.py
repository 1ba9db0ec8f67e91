import numpy as np
import pytest
from blocktune.evaluators import get

RNG = np.random.default_rng(0)
PICTURE = np.clip(RNG.normal(0.5, 0.15, (20, 24, 3)).cumsum(0).cumsum(1) % 1, 0, 1)


def compare(name: str, image, reference) -> float:
    return float(get(name).score([image], ["a photo of a red circle"], [reference])[0])


@pytest.mark.parametrize(("error", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0), (0.0, 100.0)])
def test_psnr_of_a_known_error(error, decibels):
    assert compare("psnr", np.full((16, 16, 3), error), np.zeros((16, 16, 3))) == pytest.approx(decibels, abs=1e-5)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equations 13-16, window by window."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a, b = x[i : i + 11, j : j + 11, channel], y[i : i + 11, j : j + 11, channel]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
                values.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_ssim_is_the_published_formula(noise):
    x = PICTURE.astype(np.float32).astype(np.float64)
    y = np.clip(x + np.random.default_rng(1).normal(0, noise, x.shape), 0, 1).astype(np.float32).astype(np.float64)
    assert compare("ssim", x, y) == pytest.approx(ssim_by_hand(x, y), abs=1e-10)


def test_ssim_of_equal_and_of_inverted_pictures():
    assert compare("ssim", PICTURE, PICTURE) == 1.0
    assert -1 <= compare("ssim", 1 - PICTURE, PICTURE) < 0


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_falls_with_noise_and_is_symmetric(name):
    noise = np.random.default_rng(2).normal(0, 1, PICTURE.shape)
    scores = [compare(name, np.clip(PICTURE + s * noise, 0, 1), PICTURE) for s in (0, 0.02, 0.05, 0.1, 0.3)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    noisy = np.clip(PICTURE + 0.1 * noise, 0, 1)
    assert compare(name, noisy, PICTURE) == pytest.approx(compare(name, PICTURE, noisy), abs=1e-12)


@pytest.mark.parametrize(("name", "lowest"), [("psnr", 0.0), ("ssim", -1.0)])
@pytest.mark.parametrize("broken", [PICTURE[:16], PICTURE * np.nan, PICTURE + np.inf, np.empty((0, 0, 3))])
def test_a_picture_that_cannot_be_compared_gets_the_lowest_value(name, lowest, broken):
    assert compare(name, broken, PICTURE) == lowest
    assert compare(name, PICTURE, broken) == lowest


def test_ssim_gives_the_lowest_value_to_pictures_smaller_than_its_window():
    assert compare("ssim", PICTURE[:10], PICTURE[:10]) == -1
    assert compare("ssim", PICTURE[:11], PICTURE[:11]) == 1
