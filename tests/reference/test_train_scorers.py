"""The scorers' trainers, run very small: what they make loads, and they go on where they were stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from blocktune.evaluators.aesthetic import AestheticV2
from blocktune.evaluators.clip_scores import HpsV21
from blocktune.evaluators.detection import InstanceDetector
from blocktune.reference import prompts, train_aesthetic, train_clip, train_detector
from blocktune.reference.prompts import PER_KIND
from blocktune.reference.scenes import SHAPES, SIZE, Object, render
from blocktune.reference.scorers import DETECTOR
from blocktune.reference.train import sample_pairs
from PIL import Image
from safetensors.torch import load_file

PICTURES = [
    Image.fromarray(np.uint8(255 * picture))
    for picture in render(sample_pairs(3, np.random.default_rng(0))[1]).permute(0, 2, 3, 1).numpy()
]
TEXTS = ["a photo of a circle", "a photo of a red-colored ring", "a walrus"]


@pytest.fixture
def run(monkeypatch):
    def run(module, *options) -> None:
        monkeypatch.setattr("sys.argv", ["train", *map(str, options)])
        module.main()

    return run


def test_a_stopped_training_of_the_clip_goes_on(tmp_path: Path, run):
    sizes = ("--device", "cpu", "--scenes", 16, "--batch", 4, "--work", tmp_path)
    run(train_clip, *sizes, "--out", tmp_path / "clip", "--steps", 2)
    before = torch.load(tmp_path / "clip.pt", weights_only=True)
    run(train_clip, *sizes, "--out", tmp_path / "clip", "--steps", 3)
    after = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert (before["done"], after["done"]) == (2, 3)
    assert not torch.equal(before["model"]["text_projection"], after["model"]["text_projection"])
    record = json.loads((tmp_path / "clip" / "training.json").read_text())
    assert record["steps"] == 3
    assert record["seconds"] >= round(after["seconds"])
    assert after["seconds"] > before["seconds"]  # of both processes

    run(train_clip, *sizes, "--preference", "--start", tmp_path / "clip", "--out", tmp_path / "hps", "--steps", 1)
    names = [f"local-dir:{tmp_path / name}" for name in ("clip", "hps")]
    scores = [HpsV21(name).score(PICTURES, TEXTS) for name in names]
    assert np.isfinite(scores).all()
    assert (scores[0] != scores[1]).any()

    run(train_aesthetic, "--clip", names[0], "--out", tmp_path / "head.pth", "--scenes", 64)
    ratings = AestheticV2(f"{tmp_path / 'head.pth'} with {names[0]}").score(PICTURES, TEXTS)
    assert np.isfinite(ratings).all()  # after so few steps they may lie anywhere
    assert len(set(ratings)) == len(PICTURES)


def test_a_stopped_training_of_the_detector_goes_on(tmp_path: Path, run):
    sizes = ("--device", "cpu", "--scenes", 8, "--generated", 4, "--batch", 4, "--work", tmp_path)
    run(train_detector, *sizes, "--out", tmp_path / "detector", "--steps", 2)
    before = torch.load(tmp_path / "detector.pt", weights_only=True)
    kept = np.load(tmp_path / "generated-4-0.npy")
    run(train_detector, *sizes, "--out", tmp_path / "detector", "--steps", 3)
    after = torch.load(tmp_path / "detector.pt", weights_only=True)
    assert (before["done"], after["done"]) == (2, 3)
    assert not torch.equal(before["model"]["class_predictor.weight"], after["model"]["class_predictor.weight"])
    assert kept.shape == (4, SIZE, SIZE, 3)
    assert kept.std() > 10
    detector = InstanceDetector(tmp_path / "detector", shortest=64, longest=64)
    assert detector.labels == SHAPES
    for found in detector.detect(PICTURES, [set(SHAPES)] * 3):
        assert all(d.mask is not None and d.mask.shape == (SIZE, SIZE) for d in found)


def test_training_from_a_detector_begins_with_what_it_sees(tmp_path: Path, run):
    """A rate of nothing leaves it as it was, but for half precision and the statistics of the backbone's batches."""
    sizes = ("--device", "cpu", "--scenes", 8, "--generated", 0, "--batch", 4, "--work", tmp_path)
    run(train_detector, *sizes, "--start", DETECTOR, "--out", tmp_path / "detector", "--steps", 1, "--lr", 0)
    states = [load_file(folder / "model.safetensors") for folder in (DETECTOR, tmp_path / "detector")]
    heads = [name for name in states[0] if "decoder" in name]
    assert heads
    assert all(torch.equal(states[0][name], states[1][name]) for name in heads)
    surer = states[1]["class_predictor.weight"] / states[0]["class_predictor.weight"]
    assert surer.unique().tolist() == [train_detector.SURER]
    assert json.loads((tmp_path / "detector" / "training.json").read_text())["start"]["steps"] > 1


def test_no_prompt_that_a_detector_is_judged_by_is_trained_on():
    chosen = train_detector.choose_prompts(600, seed=0)
    assert (
        len({prompt.seed for prompt in chosen} | {p.seed for s in PER_KIND for p in prompts(s)}) == 600 + 384 + 768 * 2
    )
    assert {prompt.text for prompt in chosen} <= {prompt.text for prompt in prompts("search")}
    assert not {prompt.text for prompt in chosen} & {p.text for s in ("confirm", "test") for p in prompts(s)}
    assert 0.5 < np.mean([prompt.kind == "counting" for prompt in chosen]) < 0.7


def test_the_detector_learns_what_the_exact_judge_finds():
    """The third and the fourth object touch, and are no shape together."""
    scene = [Object(*o) for o in (("ring", "red", 10.0, 10.0, 8.0), ("cross", "blue", 36.0, 10.0, 6.0))]
    touching = [Object("square", "black", x, 36.0, 6.0) for x in (12.0, 23.0)]
    drawn = render([scene, scene + touching, touching]).permute(0, 2, 3, 1)
    images = (255 * drawn).round().byte().numpy()
    owners, labels = train_detector.find_all(images)
    assert owners.dtype == torch.uint8
    assert labels[:, :3].tolist() == [[SHAPES.index("ring"), SHAPES.index("cross"), -1]] * 2 + [[-1] * 3]
    assert owners[0].unique().tolist() == [0, 1, 2]
    assert torch.equal(owners[0], owners[1])
    assert not owners[2].any()
    assert (owners[0, 10, 10], owners[0, 10, 4], owners[0, 10, 36]) == (0, 1, 2)  # a ring has a hole


def test_every_object_is_matched_with_the_query_that_shows_it():
    """Two objects, shown by the last two of four queries, crosswise; what is left has to find nothing."""
    true = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
    true[0, 0, :4], true[0, 1, 5:] = True, True
    labels = torch.tensor([[2, 5, -1, -1]])
    masks = torch.full((1, 4, 8, 8), -9.0)
    masks[0, 3][true[0, 0]], masks[0, 2][true[0, 1]] = 9.0, 9.0
    classes = torch.full((1, 4, len(SHAPES) + 1), -9.0)
    classes[0, 3, 2] = classes[0, 2, 5] = classes[0, 0, -1] = classes[0, 1, -1] = 9.0
    assert train_detector.match(classes, masks, labels, true)[0, :2].tolist() == [3, 2]
    right = train_detector.loss_of(classes, masks, labels, true)
    assert right < 0.05
    assert train_detector.loss_of(classes, masks, labels[:, [1, 0, 2, 3]], true) > 5


def test_every_true_sentence_has_to_lie_above_all_false_ones():
    true = torch.tensor([[True, False, True], [False, False, True]])
    scores = torch.tensor([[2.0, 0.0, 1.0], [3.0, 1.0, 2.0]])
    by_hand = [
        (np.log1p(np.exp(0 - 2)) + np.log1p(np.exp(0 - 1))) / 2,
        np.log1p(np.exp(np.log(np.exp(3) + np.exp(1)) - 2)),
    ]
    assert train_clip.ranking(scores, true).item() == pytest.approx(np.mean(by_hand), rel=1e-6)
    nothing = torch.zeros(1, 3, dtype=torch.bool)  # a row without a true sentence says nothing
    both = train_clip.ranking(torch.cat([scores, scores[:1]]), torch.cat([true, nothing]))
    assert both.item() == pytest.approx(np.mean(by_hand), rel=1e-6)
