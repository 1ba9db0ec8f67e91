"""The models behind T2I-CompBench's rules, loaded from tiny checkpoints in the formats of the real ones."""

import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, get, t2i_compbench
from blocktune.evaluators.checkpoints import load_pretrained
from blocktune.evaluators.clip import _model, load_clip
from blocktune.evaluators.phrases import phrases_of
from blocktune.evaluators.t2i_evaluators import Complex, DepthEstimator, NonSpatial, Spatial
from blocktune.evaluators.vqa import ask
from PIL import Image

from .judges import TINY, blip, clip, dpt, owlv2

T2I = [name for name in TINY if name.startswith("t2i")]


def picture(seed: int = 0, size: tuple[int, int] = (48, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


PICTURES = [picture(i) for i in range(3)]


@pytest.mark.parametrize("name", T2I)
def test_construction_loads_nothing(name):
    evaluator = get(name)  # of the real checkpoints, which are not here
    assert evaluator.name == name
    assert (evaluator.score([], []) == np.zeros(0)).all()


def test_attribute_is_the_product_over_noun_chunks():
    evaluator = TINY["t2i_attribute"]()
    prompt = "a red circle and a blue square"
    answers = ask(blip(), PICTURES, [["a red circle?", "a blue square?"]] * 3, evaluator.pixels)
    expected = [first * second for first, second in answers]
    np.testing.assert_allclose(evaluator.score(PICTURES, [prompt] * 3), expected, atol=1e-5)
    assert (evaluator.score(PICTURES, [""] * 3) == 1).all()


def test_words_are_detected_in_the_picture_and_best_first():
    evaluator = TINY["t2i_spatial"]()
    for image in (picture(0, (40, 64)), picture(1, (64, 40))):
        ((*found,),) = evaluator.detector.detect([image], [["cat", "dog"]])
        assert found
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        for d in found:
            assert d.label in ("cat", "dog")
            assert d.score > evaluator.detector.threshold
            assert 0 <= d.box[0] <= d.box[2] <= image.width
            assert 0 <= d.box[1] <= d.box[3] <= image.height


def test_a_box_is_in_parts_of_the_longer_side():
    detector = TINY["t2i_spatial"]().detector
    logits = torch.tensor([[3.0, -3.0], [-9.0, -9.0], [-3.0, 4.0]])
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1], [0.5, 0.75, 0.2, 0.5]])
    cup, cat = detector._read(logits, boxes, (200, 100), ["cat", "cup"])  # the surest first, the unsure not at all
    assert (cat.label, cup.label) == ("cat", "cup")
    assert cat.box == pytest.approx((0, 0, 100, 100))
    assert cup.box == pytest.approx((80, 100, 120, 100))  # below the picture the square is empty
    assert cat.score == pytest.approx(torch.tensor(3.0).sigmoid().item())


def test_a_word_is_scored_alone_as_beside_more_words():
    detector = TINY["t2i_spatial"]().detector
    alone = detector.detect(PICTURES, [["cat"], [], ["dog"]])
    together = detector.detect(PICTURES, [["cat"], ["dog", "bird", "a rather long name"], ["dog"]])
    assert alone[1] == []
    for a, b in ((alone[0], together[0]), (alone[2], together[2])):
        np.testing.assert_allclose([d.score for d in a], [d.score for d in b], atol=1e-5)


def test_depths_fill_the_frame():
    estimator = TINY["t2i_3d_spatial"]().depth
    square, wide = estimator.depths([picture(0), picture(1, (40, 80))])
    assert square.shape == (479, 479)
    assert wide.shape == (240, 480)
    assert (square.min(), square.max()) == pytest.approx((0, 1), abs=0.02)
    np.testing.assert_allclose(square * 255, np.round(square * 255), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("t2i_spatial", "a cat near a dog"),
        ("t2i_3d_spatial", "a cat in front of a dog"),
        ("t2i_numeracy", "two cats and one dog"),
    ],
)
def test_scores_are_the_rules_of_what_is_detected(name, prompt):
    evaluator = TINY[name]()
    images = PICTURES
    scores = evaluator.score(images, [prompt] * 3)
    for image, score in zip(images, scores, strict=True):
        (found,) = evaluator.detector.detect([image], [["cat", "dog"]])
        found = [d.scaled(479 / 48) for d in found]
        assert found
        if name == "t2i_spatial":
            expected = t2i_compbench.spatial("near", ("cat", "dog"), found)
        elif name == "t2i_3d_spatial":
            (depth,) = evaluator.depth.depths([image])
            expected = t2i_compbench.spatial_3d("in front of", ("cat", "dog"), found, depth)
        else:
            expected = t2i_compbench.numeracy([("cat", 2), ("dog", 1)], found)
        assert score == pytest.approx(expected, abs=1e-4)
    assert scores.any()


def test_non_spatial_is_the_cosine():
    texts = ["a cat", "", "long " * 200]
    pictures, words = load_clip(clip()).images(PICTURES), load_clip(clip()).texts(texts)
    expected = [float(a @ b) for a, b in zip(pictures, words, strict=True)]
    np.testing.assert_allclose(TINY["t2i_non_spatial"]().score(PICTURES, texts), expected, atol=1e-6)


def test_a_depth_checkpoint_may_lack_what_is_never_computed_with(tmp_path):
    """As the published ones do: transformers has weights for adding to the deepest layer, which nothing precedes."""
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    model = DPTForDepthEstimation.from_pretrained(dpt())
    state = {key: value for key, value in model.state_dict().items() if "layers.0.residual_layer1" not in key}
    assert len(state) < len(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=state)
    DPTImageProcessor.from_pretrained(dpt()).save_pretrained(tmp_path)
    (expected,) = TINY["t2i_3d_spatial"]().depth.depths(PICTURES[:1])
    (depth,) = DepthEstimator(tmp_path, pixels=64).depths(PICTURES[:1])
    np.testing.assert_array_equal(depth, expected)


def test_complex_is_three_in_one(tmp_path):
    prompts = ["The cat is on top of the dog.", "The cat eats the dog.", "The cat is near the dog."]
    (tmp_path / "spatial.txt").write_text(f"{prompts[0]}\n")
    (tmp_path / "action.txt").write_text(f"{prompts[1].upper()}\n")
    evaluator = Complex(blip(), owlv2(), clip(), tmp_path / "spatial.txt", tmp_path / "action.txt")
    evaluator.attribute = TINY["t2i_attribute"]()
    attribute = evaluator.attribute.score(PICTURES, prompts)
    spatial = Spatial(owlv2(), complex_prompts=True).score(PICTURES, prompts)
    words = [t2i_compbench.without_adjectives(phrases_of(prompt)) for prompt in prompts]
    action = NonSpatial(clip()).score(PICTURES, words)
    expected = [
        (attribute[0] + spatial[0]) / 2,
        (attribute[1] + action[1]) / 2,
        (attribute[2] + spatial[2] + action[2]) / 3,
    ]
    np.testing.assert_allclose(evaluator.score(PICTURES, prompts), expected, atol=1e-5)


@pytest.mark.parametrize("name", T2I)
def test_broken_pictures_score_nothing(name):
    broken = [np.zeros((48, 48, 3)), np.full((48, 48, 3), np.nan), np.ones((48, 48, 3)), np.zeros((4, 4))]
    scores = TINY[name]().score([*broken, np.asarray(picture(0, (31, 77)))], ["a cat on the left of two dogs"] * 5)
    assert (scores[:4] == 0).all()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", T2I)
@pytest.mark.parametrize("prompt", ["", "a cat", "word " * 200], ids=["empty", "one thing", "200 words"])
def test_any_prompt_has_a_score(name, prompt):
    scores = TINY[name]().score(PICTURES, [prompt] * 3)
    assert np.isfinite(scores).all()


def test_evaluators_of_the_same_weights_share_them():
    judges = TINY["geneval-style"](), TINY["geneval-style_binary"]()
    assert judges[0].detector.model is judges[1].detector.model
    before = load_pretrained.cache_info().misses
    for name in T2I:  # some of which scored before, each of whose models another has too
        TINY[name]().score(PICTURES, ["a red cat near two dogs"] * 3)
    loaded = load_pretrained.cache_info().misses - before
    assert loaded <= 3  # BLIP, OWLv2, DPT
    for name in T2I:
        TINY[name].__wrapped__().score(PICTURES, ["a red cat near two dogs"] * 3)
    assert load_pretrained.cache_info().misses == before + loaded


@pytest.mark.parametrize("make", [NonSpatial, lambda clip: get("geneval").__class__(clip=clip)])
def test_a_clip_that_cannot_be_is_refused_at_once(make):
    with pytest.raises(CheckpointError, match="clip model is 'ViT-B-33/openai'; accepted: ARCHITECTURE/TAG"):
        make(clip="ViT-B-33/openai")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: compares it with the CPU")
@pytest.mark.parametrize("name", sorted(TINY))
def test_gpu_and_cpu_agree(name, monkeypatch):
    """In float32 on both, loaded for this test alone: half precision may lift a random box over a threshold."""
    prompts = ["a photo of a red circle", "a photo of two rings", "a photo of a cross left of a ring"]
    for module in ("checkpoints", "clip"):
        monkeypatch.setattr(f"blocktune.evaluators.{module}.precision", lambda half=torch.float16: torch.float32)
    for module in ("blip", "detection", "t2i_evaluators", "vqa"):
        monkeypatch.setattr(f"blocktune.evaluators.{module}.load_pretrained", load_pretrained.__wrapped__)
    monkeypatch.setattr("blocktune.evaluators.clip._model", _model.__wrapped__)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions round to 10 bits by default
    on_gpu = TINY[name].__wrapped__().score(PICTURES, prompts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = TINY[name].__wrapped__().score(PICTURES, prompts)
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3)
