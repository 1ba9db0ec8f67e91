import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, get

from . import checkpoints
from .test_clip_scores import PROMPTS, photos, raw_vectors


def unit_vectors(name: str) -> np.ndarray:
    images, _, _ = raw_vectors(name.partition(" with ")[2])
    return np.array([image / np.sqrt(image @ image) for image in images])


def test_v1_is_one_linear_layer_on_the_unit_vector(model_scores):
    name = model_scores["aesthetic_v1"]
    head = torch.load(name.partition(" with ")[0].partition(":")[2])
    expected = unit_vectors(name) @ head["weight"][0].double().numpy() + head["bias"].item()
    np.testing.assert_allclose(get(name).score(photos(), PROMPTS), expected, rtol=0, atol=1e-5)


def test_v2_is_the_published_stack_of_layers(model_scores):
    name = model_scores["aesthetic_v2"]
    with torch.no_grad():
        expected = checkpoints.aesthetic_mlp(96)(torch.tensor(unit_vectors(name)).float())[:, 0]
    np.testing.assert_allclose(get(name).score(photos(), PROMPTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["aesthetic_v1", "aesthetic_v2"])
def test_no_unit_vector_scores_below_the_worst_value(family, model_scores):
    head = model_scores[family].partition(" with ")[0].partition(":")[2]
    if family == "aesthetic_v1":
        layers = torch.nn.Linear(96, 1)
        layers.load_state_dict(torch.load(head))
    else:
        layers = checkpoints.aesthetic_mlp(96)
    direction = torch.autograd.functional.jacobian(lambda vector: layers(vector)[0], torch.zeros(96))
    with torch.no_grad():
        lowest = layers(-direction / direction.norm()).item()
    assert get(model_scores[family]).worst == pytest.approx(lowest, abs=1e-5)


def test_heads_of_another_layout_are_refused(model_scores, tmp_path):
    clip = model_scores["clip_score"].partition(":")[2]
    v1, v2 = checkpoints.aesthetic_v1(tmp_path / "v1.pth"), checkpoints.aesthetic_v2(tmp_path / "v2.pth")
    for name, said in (
        (f"aesthetic_v1:{v2} with {clip}", r"holds layers\.0\.bias, .*; accepted: bias, weight"),
        (f"aesthetic_v2:{v1} with {clip}", r"holds bias, weight; accepted: layers\.0\.bias"),
        (
            f"aesthetic_v1:{checkpoints.aesthetic_v1(tmp_path / 'wide.pth', 24)} with {clip}",
            "takes vectors of 24; accepted: 96",
        ),
    ):
        with pytest.raises(CheckpointError, match=said):
            get(name).score(photos(), PROMPTS)
