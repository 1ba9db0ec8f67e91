import numpy as np
import torch
from blocktune.evaluators import get
from blocktune.reference.degradations import degrade
from blocktune.reference.scenes import prompt_of, render
from blocktune.reference.train import sample_pairs

REQUESTS, SCENES = sample_pairs(160, np.random.default_rng(0))
PICTURES = render(SCENES)


def degraded(strength: float, seed: int = 0) -> torch.Tensor:
    return degrade(PICTURES, torch.full((len(PICTURES),), strength), torch.Generator().manual_seed(seed))


def test_quality_is_lost_by_degrees_and_what_is_shown_is_not():
    texts = [prompt_of(request) for request in REQUESTS]
    means, right = [], []
    for strength in (0.0, 0.25, 1.0):
        images = degraded(strength).permute(0, 2, 3, 1).numpy()
        assert images.min() >= 0
        assert images.max() <= 1
        crisp = get("crispness").score(images, texts)
        means.append(crisp.mean())
        right.append(get("shapes_binary").score(images, texts).mean())
    assert means[0] > means[1] + 0.1 > means[2] + 0.2
    assert right[0] > 0.98
    assert right[1] > 0.95


def test_no_strength_changes_nothing_and_seeds_repeat():
    torch.testing.assert_close(degraded(0.0), PICTURES, rtol=0, atol=1e-6)
    assert torch.equal(degraded(0.5, seed=1), degraded(0.5, seed=1))
    assert not torch.equal(degraded(0.5, seed=1), degraded(0.5, seed=2))
