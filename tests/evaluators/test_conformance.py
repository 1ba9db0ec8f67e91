"""What every registered evaluator must hold to, whoever wrote it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blocktune.evaluators import Evaluator, names, registry, scale_of
from PIL import Image

from .judges import TINY

ROOT = Path(__file__).parents[2]
SIZE = 48
RELATIVE = 1e-5  # of float32, on scales of up to 100
PRETRAINED = {"geneval", "geneval_binary"}  # whose checkpoints are not here
TRAINED = [name for name in names() if name.endswith(":reference")]  # by small models that are
MANY = {"clip_score:reference", "hps_v2.1:reference", "aesthetic_v2:reference"}  # cheap enough for two batches
NAMES = sorted({*names(), *TINY} - PRETRAINED - {"geneval-style"})  # which `geneval-style:reference` stands for
PROMPTS = [
    "a photo of a red circle",
    "a photo of two blue squares",
    "a photo of a cross left of a ring",
    "a photo of a yellow diamond and a black triangle",
    "a photo of a circle",
]


def get(name: str) -> Evaluator:
    return TINY[name]() if name in TINY else registry.get(name)


def pictures(seed: int = 0) -> np.ndarray:
    """uint8 `(5, 48, 48, 3)`: grey ground, a coloured square and a little noise each."""
    rng = np.random.default_rng(seed)
    images = np.full((len(PROMPTS), SIZE, SIZE, 3), 235, np.int64)
    for image in images:
        y, x = rng.integers(4, 28, 2)
        image[y : y + 14, x : x + 14] = rng.integers(10, 240, 3)
    return (images + rng.integers(-6, 7, images.shape)).clip(0, 255).astype(np.uint8)


class EvaluatorConformance:
    """Each test takes the `name` of an evaluator, a parameter or fixture of the class that inherits these."""

    @staticmethod
    def tolerance(name: str) -> float:
        """Of one picture's score in another batch: models compute in float32, and other sizes in another order."""
        return 1e-5 if name in TINY or name in TRAINED else 1e-9

    @staticmethod
    def score(name: str, images, prompts=None, reference=None) -> np.ndarray:
        evaluator = get(name)
        prompts = PROMPTS[: len(images)] if prompts is None else prompts
        if evaluator.needs_reference and reference is None:
            reference = pictures(1)[: len(images)]
        scores = evaluator.score(images, prompts, reference)
        assert isinstance(scores, np.ndarray)
        assert scores.dtype == np.float64
        assert scores.shape == (len(images),)
        assert np.isfinite(scores).all()
        return scores

    def test_says_what_it_is(self, name):
        evaluator = get(name)
        assert isinstance(evaluator, Evaluator)
        assert evaluator.name == name
        assert evaluator.direction in ("maximize", "minimize")
        assert isinstance(evaluator.needs_reference, bool)
        assert 0 < scale_of(evaluator) <= 100
        assert get(name) is evaluator

    def test_scores_pictures(self, name):
        self.score(name, pictures())

    @pytest.mark.parametrize(
        "broken",
        [
            np.zeros((5, SIZE, SIZE, 3), np.uint8),
            np.full((5, SIZE, SIZE, 3), 255, np.uint8),
            np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8),
            np.full((5, SIZE, SIZE, 3), np.nan, np.float32),
            np.full((5, SIZE, SIZE, 3), np.inf, np.float32),
            np.random.default_rng(0).normal(0, 1e30, (5, SIZE, SIZE, 3)),
            np.random.default_rng(0).random((5, 32, 40, 3), np.float32),
            np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8),
        ],
        ids=["black", "white", "noise", "nan", "inf", "huge", "small", "large"],
    )
    def test_broken_pictures_have_a_defined_score(self, name, broken):
        scores = self.score(name, broken)
        evaluator = get(name)
        if evaluator.needs_reference:  # and a worse one than the reference itself
            sign = 1 if evaluator.direction == "maximize" else -1
            assert (sign * scores < sign * self.score(name, pictures(1))).all()

    def test_pictures_of_a_few_pixels_have_a_defined_score(self, name):
        images = np.random.default_rng(0).integers(0, 256, (5, 7, 5, 3), dtype=np.uint8)
        self.score(name, images, PROMPTS, images[::-1])

    def test_one_nan_pixel_does_not_touch_the_neighbours(self, name):
        images = pictures().astype(np.float32) / 255
        clean = self.score(name, images)
        images[2, 5, 5, 1] = np.nan
        others = [0, 1, 3, 4]
        np.testing.assert_allclose(
            self.score(name, images)[others], clean[others], rtol=RELATIVE, atol=self.tolerance(name)
        )

    def test_uint8_float_and_pil_agree(self, name):
        images = pictures()
        scores = self.score(name, images)
        forms = [
            images / 255,
            (images / 255).astype(np.float32),
            list(images),
            list(images / 255),
            [Image.fromarray(image) for image in images],
        ]
        for form in forms:
            np.testing.assert_allclose(self.score(name, form), scores, rtol=0, atol=1e-6)

    def test_does_not_depend_on_batch_or_order(self, name):
        images, reference = pictures(), pictures(1)
        scores = self.score(name, images, PROMPTS, reference)
        alone = [self.score(name, images[i : i + 1], PROMPTS[i : i + 1], reference[i : i + 1])[0] for i in range(5)]
        np.testing.assert_allclose(alone, scores, rtol=RELATIVE, atol=self.tolerance(name))
        order = [3, 0, 4, 2, 1]
        shuffled = self.score(name, images[order], [PROMPTS[i] for i in order], reference[order])
        np.testing.assert_allclose(shuffled, scores[order], rtol=RELATIVE, atol=self.tolerance(name))
        if name in MANY:
            wide = self.score(name, np.tile(images, (7, 1, 1, 1)), PROMPTS * 7, np.tile(reference, (7, 1, 1, 1)))
            np.testing.assert_allclose(wide, np.tile(scores, 7), rtol=RELATIVE, atol=self.tolerance(name))

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_does_not_change_its_inputs(self, name, dtype):
        images, reference = ((pictures(seed) / (1 if dtype is np.uint8 else 255)).astype(dtype) for seed in (0, 1))
        prompts = list(PROMPTS)
        before = images.copy(), reference.copy()
        self.score(name, images, prompts, reference)
        np.testing.assert_array_equal(images, before[0])
        np.testing.assert_array_equal(reference, before[1])
        assert prompts == PROMPTS

    def test_no_pictures(self, name):
        self.score(name, [], [], [])

    @pytest.mark.parametrize("count", [0, 3, 6])
    def test_refuses_another_number_of_prompts(self, name, count):
        with pytest.raises(ValueError, match=rf"(?s)\b{count}\b.*\b5\b|\b5\b.*\b{count}\b"):
            self.score(name, pictures(), (PROMPTS * 2)[:count])

    def test_reference(self, name):
        evaluator = get(name)
        if evaluator.needs_reference:
            with pytest.raises(ValueError, match="reference"):
                evaluator.score(pictures(), PROMPTS)
            with pytest.raises(ValueError, match=r"\b3\b.*\b5\b"):
                evaluator.score(pictures(), PROMPTS, pictures(1)[:3])
        else:  # one that needs none is not changed by one
            scores = evaluator.score(pictures(), PROMPTS)
            np.testing.assert_array_equal(evaluator.score(pictures(), PROMPTS, pictures(1)), scores)


@pytest.mark.parametrize("name", NAMES)
class TestEvaluators(EvaluatorConformance):
    pass


def test_models_agree_in_two_processes(tmp_path):
    """Checkpoints are made anew there, of the same seeds."""
    np.save(tmp_path / "images.npy", pictures())
    code = f"""
import json, numpy as np
from blocktune.evaluators import get
from tests.evaluators.judges import TINY
images = np.load({str(tmp_path / "images.npy")!r})
models = {{name: made() for name, made in TINY.items()}} | {{name: get(name) for name in {TRAINED!r}}}
print(json.dumps({{name: model.score(images, {PROMPTS!r}).tolist() for name, model in models.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    there = json.loads(done.stdout.splitlines()[-1])
    assert there.keys() == TINY.keys() | set(TRAINED)
    for name, scores in there.items():
        relative = 1e-5 if name in TRAINED else 0
        np.testing.assert_allclose(scores, get(name).score(pictures(), PROMPTS), rtol=relative, atol=1e-5)
