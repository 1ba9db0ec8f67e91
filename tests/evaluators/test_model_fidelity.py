"""`lpips` and `dinov2` against their formulas."""

import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, get
from PIL import Image
from torch.nn.functional import conv2d, max_pool2d, relu

from .test_clip_scores import cosine, photos

SIZES = ((48, 40), (64, 64), (40, 64))


def changed(pictures: list[Image.Image], strength: float) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    arrays = [np.asarray(picture) + strength * rng.normal(0, 64, np.asarray(picture).shape) for picture in pictures]
    return [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in arrays]


def lpips_by_hand(picture: Image.Image, reference: Image.Image, heads: dict, alexnet: dict) -> float:
    """Zhang et al. 2018, equation 1, on the five rectified layers of AlexNet."""

    def features(image: Image.Image) -> list[torch.Tensor]:
        x = torch.tensor(np.asarray(image) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        layers = []
        for index, (stride, padding, pooled) in {
            0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)
        }.items():  # fmt: skip
            x = max_pool2d(x, 3, 2) if pooled else x
            weight, bias = alexnet[f"features.{index}.weight"], alexnet[f"features.{index}.bias"]
            x = relu(conv2d(x, weight, bias, stride, padding))
            layers.append(x[0])
        return layers

    total = 0.0
    for layer, (a, b) in enumerate(zip(features(picture), features(reference), strict=True)):
        places = []
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                difference = a[:, i, j] / (a[:, i, j].norm() + 1e-10) - b[:, i, j] / (b[:, i, j].norm() + 1e-10)
                places.append((heads[f"lin{layer}.model.1.weight"].flatten() * difference**2).sum().item())
        total += np.mean(places)
    return total


def test_lpips_is_the_published_formula(model_scores):
    name = model_scores["lpips"]
    heads, alexnet = (torch.load(file) for file in name.partition(":")[2].split(" with "))
    reference = photos(SIZES)
    pictures = changed(reference, 0.5)
    expected = [lpips_by_hand(a, b, heads, alexnet) for a, b in zip(pictures, reference, strict=True)]
    np.testing.assert_allclose(get(name).score(pictures, ["a"] * 3, reference), expected, rtol=0, atol=1e-5)


def test_dinov2_is_the_cosine_of_class_tokens(model_scores):
    from transformers import AutoImageProcessor, AutoModel

    name = model_scores["dinov2"]
    folder = name.partition(":")[2]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    reference = photos(SIZES)
    pictures = changed(reference, 2.0)
    expected = []
    for pair in zip(pictures, reference, strict=True):
        with torch.no_grad():
            hidden = [model(**processor(images=p, return_tensors="pt")).last_hidden_state for p in pair]
        expected.append(cosine(*(h[0, 0].double().numpy() for h in hidden)))
    scores = get(name).score(pictures, ["a"] * 3, reference)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert (scores < 1 - 1e-4).all()


@pytest.mark.parametrize("family", ["lpips", "dinov2"])
def test_grows_with_the_change_and_is_symmetric(family, model_scores):
    evaluator = get(model_scores[family])
    sign = -1 if evaluator.direction == "maximize" else 1
    reference = photos(SIZES)
    values = [sign * evaluator.score(changed(reference, s), ["a"] * 3, reference) for s in (0, 0.25, 4.0)]
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()
    np.testing.assert_allclose(values[0], 0 if family == "lpips" else -1, rtol=0, atol=1e-6)
    swapped = evaluator.score(reference, ["a"] * 3, changed(reference, 0.25))
    np.testing.assert_allclose(sign * swapped, values[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["lpips", "dinov2"])
def test_a_picture_that_cannot_be_compared_gets_the_worst_value(family, model_scores):
    evaluator = get(model_scores[family])
    whole = np.asarray(photos()[0]) / 255
    broken = whole.copy()
    broken[3, 4, 1] = np.nan
    scores = evaluator.score([broken, whole, whole[:36], whole], ["a"] * 4, [whole, broken, whole, 1 - whole])
    assert (scores[:3] == evaluator.worst).all()
    assert scores[3] != evaluator.worst


def test_lpips_never_exceeds_the_worst_value(model_scores):
    evaluator = get(model_scores["lpips"])
    reference = np.zeros((2, 48, 48, 3))
    opposite = np.stack([np.ones((48, 48, 3)), np.random.default_rng(0).integers(0, 2, (48, 48, 3)).astype(float)])
    assert (evaluator.score(opposite, ["a", "b"], reference) < evaluator.worst).all()


def test_lpips_gives_the_worst_value_to_what_it_cannot_see(model_scores):
    evaluator, pictures = get(model_scores["lpips"]), photos(((31, 64), (32, 64)))
    assert evaluator.score(pictures, ["a", "b"], pictures).tolist() == [evaluator.worst, 0]


def test_lpips_refuses_other_weights(model_scores):
    heads, alexnet = model_scores["lpips"].partition(":")[2].split(" with ")
    for name, said in (
        (f"lpips:{alexnet} with {alexnet}", r"hold features\.0\.bias.*; accepted: lin0\.model\.1\.weight"),
        (f"lpips:{heads} with {heads}", "alexnet .* does not fit"),
    ):
        with pytest.raises(CheckpointError, match=said):
            get(name).score(photos(), ["a"] * 3, photos())
