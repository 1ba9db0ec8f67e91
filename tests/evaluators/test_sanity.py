import numpy as np
import pytest
from blocktune.evaluators import get
from blocktune.evaluators.pictures import as_picture
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image


def photo(seed: int = 0) -> np.ndarray:
    """Float `(48, 48, 3)`: a gradient with a disc."""
    y, x = np.mgrid[:48, :48] / 47
    image = np.stack([0.2 + 0.6 * x, 0.3 + 0.4 * y, np.full_like(x, 0.5)], axis=-1)
    image[(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.04] = np.random.default_rng(seed).random(3)
    return image


def sane(image, reference=None) -> float:
    references = None if reference is None else [reference]
    (score,) = get("sane").score([image], ["a photo of a red circle"], references)
    return score


def spoiled(value) -> np.ndarray:
    image = photo()
    image[7, 9, 1] = value
    return image


def corners() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (48, 48, 3)).astype(np.float64)


def drawing() -> np.ndarray:
    """Black lines on a white page with grey rims: 90 % extreme."""
    image = np.ones((48, 48, 3))
    image[10:30, 10:12] = 0
    image[10:30, 12:24] = 0.5
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (photo(), 1),
        ((photo() * 255).astype(np.uint8), 1),
        (Image.fromarray((photo() * 255).astype(np.uint8)), 1),
        (drawing(), 1),
        (spoiled(1.0005), 1),
        (spoiled(np.nan), 0),
        (spoiled(np.inf), 0),
        (spoiled(-np.inf), 0),
        (spoiled(1.01), 0),
        (spoiled(-0.01), 0),
        (photo() * 255, 0),
        (np.zeros((48, 48, 3), np.uint8), 0),
        (np.full((48, 48, 3), 128, np.uint8), 0),
        (np.tile([0.9, 0.1, 0.2], (48, 48, 1)), 0),
        (np.clip(photo() * 0 + 0.5 + np.random.default_rng(0).normal(0, 0.002, (48, 48, 3)), 0, 1), 0),
        (corners(), 0),
        (photo()[:, :, :1], 0),
        (photo()[:, :, 0], 0),
        (photo().transpose(2, 0, 1), 0),
        (np.concatenate([photo(), photo()[:, :, :1]], axis=2), 0),
        (np.empty((0, 48, 3)), 0),
        (np.zeros((48, 48, 3), np.int64), 0),
        (np.full((48, 48, 3), None), 0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_cases(image, expected):
    assert sane(image) == expected


def test_size_is_held_against_the_reference():
    assert sane(photo(), photo(1)) == 1
    assert sane(photo()[:40], photo(1)) == 0


def test_pictures_of_different_sizes_are_judged_one_by_one():
    scores = get("sane").score([photo(), photo()[:20], spoiled(np.nan)], ["a", "b", "c"])
    assert scores.tolist() == [1, 1, 0]


def test_channels_first_batch_is_not_sane():
    batch = np.stack([photo(), photo(1)]).transpose(0, 3, 1, 2)
    assert get("sane").score(batch, ["a", "b"]).tolist() == [0, 0]


@given(arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)), elements=st.integers(0, 255)))
def test_bytes_are_judged_as_the_floats_they_stand_for(pixels: np.ndarray) -> None:
    assert sane(pixels) == sane(pixels / 255)


@given(arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)), elements=st.integers(0, 255)))
def test_bytes_and_the_floats_they_stand_for_are_the_same_picture(pixels: np.ndarray) -> None:
    pictures = [as_picture(form) for form in (pixels, pixels / 255, Image.fromarray(pixels))]
    assert all(p is not None and np.array_equal(np.asarray(p), pixels) for p in pictures)
