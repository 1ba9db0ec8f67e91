import numpy as np
import open_clip
import pytest
import torch
from blocktune.evaluators import CheckpointError, get
from torch import nn
from torchvision.transforms.functional import to_tensor

from .test_clip_scores import cosine, photos


def expected(checkpoint: str, picture) -> float:
    """P("Good photo.") with a copy of the model whose position embeddings are zeros of the picture's own grid."""
    model = open_clip.create_model(checkpoint).eval()
    places = (picture.width // 32) * (picture.height // 32)
    model.visual.attnpool.positional_embedding = nn.Parameter(torch.zeros(places + 1, 256))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        image = model.encode_image(((to_tensor(picture) - mean) / std)[None])[0].double().numpy()
        tokens = open_clip.get_tokenizer(checkpoint)(["Good photo.", "Bad photo."])
        good, bad = model.encode_text(tokens).double().numpy()
    scale = model.logit_scale.exp().item()
    odds = np.exp(scale * (cosine(image, good) - cosine(image, bad)))
    return odds / (1 + odds)


def test_clip_iqa_is_the_published_formula_at_any_size(model_scores):
    name = model_scores["clip_iqa"]
    pictures = photos(((64, 64), (96, 64), (64, 160), (64, 64)))
    scores = [expected(name.partition(":")[2], picture) for picture in pictures]
    np.testing.assert_allclose(get(name).score(pictures, ["a"] * 4), scores, rtol=0, atol=1e-5)
    assert np.ptp(scores) > 1e-4


def test_clip_iqa_gives_the_worst_value_to_what_it_cannot_see(model_scores):
    small, *seen = get(model_scores["clip_iqa"]).score(photos(((31, 64), (32, 64), (64, 64))), ["a"] * 3)
    assert small == 0 < min(seen)


def test_clip_iqa_refuses_another_kind_of_model(model_scores):
    transformer = model_scores["siglip_score"].partition(":")[2]
    with pytest.raises(CheckpointError, match="is no ResNet of CLIP"):
        get(f"clip_iqa:{transformer}").score(photos(((64, 64),)), ["a"])
