"""The judge is right on true renderings, and on cases worked by hand."""

import numpy as np
import pytest
from blocktune.evaluators import Evaluator, get
from blocktune.reference.scenes import KINDS, Object, prompt_of, render, sample_request, sample_scene

LEFT, RIGHT, LOW = (13.0, 14.0, 7.0), (35.0, 14.0, 7.0), (13.0, 35.0, 7.0)


def scores(scenes: list[list[Object]], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    images = render(scenes).permute(0, 2, 3, 1).numpy()
    return get("shapes").score(images, prompts), get("shapes_binary").score(images, prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_true_renderings_are_right(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    requests = [sample_request(kind, rng) for _ in range(200)]
    dense, binary = scores([sample_scene(r, rng) for r in requests], [prompt_of(r) for r in requests])
    assert binary.mean() >= 0.99
    assert dense.mean() >= 0.99


RED_CIRCLE, BLUE_SQUARE = Object("circle", "red", *LEFT), Object("square", "blue", *RIGHT)
RING = Object("ring", "green", *LOW)


@pytest.mark.parametrize(
    ("scene", "prompt", "dense", "binary"),
    [
        # wrong colour: the shape alone is half; wrong shape: the colour alone is half; both wrong: nothing
        ([RED_CIRCLE], "a photo of a red circle", 1, 1),
        ([RED_CIRCLE], "a photo of a blue circle", 1 / 2, 0),
        ([RED_CIRCLE], "a photo of a red square", 1 / 2, 0),
        ([RED_CIRCLE], "a photo of a blue square", 0, 0),
        # wrong count: found over wanted; one too many: wanted over found, and right where the prompt does not count
        ([RED_CIRCLE], "a photo of two circles", 1 / 2, 0),
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of three circles", 1 / 3, 0),
        (
            [RED_CIRCLE, Object("circle", "red", *RIGHT), Object("circle", "red", *LOW)],
            "a photo of two circles",
            2 / 3,
            0,
        ),
        ([RED_CIRCLE, RING], "a photo of a circle", 1 / 2, 1),
        # two things, one missing
        ([RED_CIRCLE], "a photo of a circle and a square", 1 / 2, 0),
        ([RED_CIRCLE, BLUE_SQUARE, RING], "a photo of a circle and a square", 2 / 3, 1),
        # swapped attribution: two halves of two
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of a red circle and a blue square", 1, 1),
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of a blue circle and a red square", 1 / 2, 0),
        # swapped relation: both there is half; one there: a half of that
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of a circle left of a square", 1, 1),
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of a circle right of a square", 1 / 2, 0),
        ([RED_CIRCLE, BLUE_SQUARE], "a photo of a circle above a square", 1 / 2, 0),
        ([RED_CIRCLE], "a photo of a circle left of a square", 1 / 4, 0),
        # nothing there, nothing asked
        ([], "a photo of a circle", 0, 0),
        ([RED_CIRCLE], "a photo of a bench", 0, 0),
        ([RED_CIRCLE], "", 0, 0),
    ],
)
def test_cases_worked_by_hand(scene: list[Object], prompt: str, dense: float, binary: float) -> None:
    got = scores([scene], [prompt])
    assert got[0][0] == pytest.approx(dense)
    assert got[1][0] == binary


@pytest.mark.parametrize("name", ["shapes", "shapes_binary"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5, np.nan])
def test_pictures_of_nothing_score_nothing(name: str, fill: float) -> None:
    evaluator = get(name)
    assert isinstance(evaluator, Evaluator)
    assert evaluator.score(np.full((1, 48, 48, 3), fill, np.float32), ["a photo of a circle"]).tolist() == [0.0]


def test_as_many_prompts_as_images() -> None:
    with pytest.raises(ValueError, match=r"one per image|equally many"):
        get("shapes").score(np.zeros((2, 48, 48, 3), np.float32), ["a photo of a circle"])
