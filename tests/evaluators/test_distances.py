import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, cmmd, fid, get, load_inception
from blocktune.evaluators.clip import load_clip
from blocktune.evaluators.dinov2 import DinoV2
from PIL import Image
from torch.nn import functional

from .checkpoints import inception

RNG = np.random.default_rng(0)


def colours(mean: tuple[float, ...], spread: float, count: int, seed: int) -> np.ndarray:
    """Pictures of one colour each, drawn around a mean."""
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(mean, spread, (count, 3)), 0, 255).astype(np.uint8)
    return np.tile(values[:, None, None], (1, 4, 4, 1))


def mean_colour(pictures) -> torch.Tensor:
    return torch.tensor(np.array([np.asarray(picture).mean(axis=(0, 1)) for picture in pictures]))


def test_fid_is_the_distance_of_gaussians():
    x, y = colours((100, 100, 100), 20, 400, 0), colours((130, 90, 100), 10, 300, 1)
    a, b = x[:, 0, 0].astype(float), y[:, 0, 0].astype(float)
    product = np.cov(a.T) @ np.cov(b.T)  # Heusel et al. 2017, equation 6; its root has the roots of its eigenvalues
    roots = np.sqrt(np.linalg.eigvals(product).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots
    assert fid(x, y, mean_colour) == pytest.approx(expected, rel=1e-9)
    assert fid(x, y, mean_colour) == pytest.approx(fid(y, x, mean_colour), rel=1e-9)
    assert expected == pytest.approx(30**2 + 10**2 + 3 * (20 - 10) ** 2, rel=0.2)
    assert fid(x, x, mean_colour) == pytest.approx(0, abs=1e-8)
    assert fid(x, x[::-1], mean_colour) == pytest.approx(0, abs=1e-8)


def test_fid_of_fewer_pictures_than_dimensions():
    def wide(pictures) -> torch.Tensor:
        return mean_colour(pictures).repeat(1, 20)

    x, y = colours((100, 100, 100), 20, 8, 0), colours((130, 90, 100), 20, 8, 1)
    assert fid(x, y, wide) == pytest.approx(20 * fid(x, y, mean_colour), rel=1e-6)


def cmmd_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum() / (2 * 10**2))

    same_a = np.mean([[kernel(x, y) for y in a] for x in a])
    same_b = np.mean([[kernel(x, y) for y in b] for x in b])
    return 1000 * (same_a + same_b - 2 * np.mean([[kernel(x, y) for y in b] for x in a]))


def test_cmmd_is_the_published_formula(model_scores):
    clip = load_clip(model_scores["clip_score"].partition(":")[2], resize_mode="squash")
    x, y = RNG.integers(0, 256, (7, 40, 32, 3), dtype=np.uint8), RNG.integers(0, 128, (5, 40, 32, 3), dtype=np.uint8)
    a, b = (clip.images([Image.fromarray(picture) for picture in images]).double().numpy() for images in (x, y))
    np.testing.assert_allclose((a**2).sum(1), 1, rtol=0, atol=1e-6)
    assert cmmd(x, y, clip.images) == pytest.approx(cmmd_by_hand(a, b), abs=1e-9)
    assert cmmd(x, y, clip.images) > 0
    assert cmmd(x, x[::-1], clip.images) == pytest.approx(0, abs=1e-9)


def test_cmmd_grows_with_the_distance():
    distances = [
        cmmd(colours((100,) * 3, 5, 50, 0), colours((100 + d,) * 3, 5, 50, 1), lambda p: mean_colour(p) / 255)
        for d in (0, 20, 60)
    ]
    assert distances == sorted(distances)
    assert distances[0] < distances[1] / 2


def test_any_vectors_will_do(model_scores):
    dino = get(model_scores["dinov2"])
    assert isinstance(dino, DinoV2)
    x, y = RNG.integers(0, 256, (4, 40, 32, 3), dtype=np.uint8), RNG.integers(0, 64, (4, 40, 32, 3), dtype=np.uint8)
    assert fid(x, y, dino.vectors) > fid(x, x, dino.vectors) + 1e-6


def test_pictures_out_of_order_are_refused():
    x = colours((100,) * 3, 5, 4, 0) / 255
    broken = x.copy()
    broken[2, 0, 0, 0] = np.nan
    for distance in (cmmd, fid):
        with pytest.raises(ValueError, match="image 2 has NaN"):
            distance(x, broken, mean_colour)
        with pytest.raises(ValueError, match="images has no pictures"):
            distance(x, [], mean_colour)
    with pytest.raises(ValueError, match="fid has 1 images and 4 reference pictures"):
        fid(x[:1], x, mean_colour)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return inception(tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth")


def test_inception_is_the_network_of_fid(weights, monkeypatch):
    """torchvision's, but for what FID's has otherwise: padding is left out of means, and the last of them is a maximum.

    Heusel et al.'s graph, as pytorch-fid describes it; pictures of 299 pixels, which are not scaled.
    """
    from torchvision.models import inception_v3

    pictures = RNG.integers(0, 256, (2, 299, 299, 3), dtype=np.uint8)
    vectors = load_inception(weights)([Image.fromarray(picture) for picture in pictures])
    assert vectors.shape == (2, 2048)
    assert vectors.dtype == torch.float32
    assert load_inception(weights)([]).shape == (0, 2048)
    model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    model.load_state_dict(torch.load(weights))
    model.fc = torch.nn.Identity()
    means, mean = [], functional.avg_pool2d

    def pool(x, **shape):
        means.append(x)
        if len(means) == 9:
            return functional.max_pool2d(x, **shape)
        return mean(x, **shape, count_include_pad=False)

    monkeypatch.setattr(functional, "avg_pool2d", pool)
    with torch.inference_mode():
        expected = model.eval()((torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 128) / 128)
    assert len(means) == 9
    assert expected.std() > 0.01
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-4)


def test_inception_sees_each_picture_alone(weights):
    """Of two sizes, together and one by one. A FID by it is told in tests/search/test_scoring.py."""
    pictures = [Image.fromarray(RNG.integers(0, 256, size, dtype=np.uint8)) for size in [(40, 32, 3), (32, 40, 3)]]
    embed = load_inception(weights)
    one_by_one = torch.cat([embed([picture]) for picture in pictures])
    np.testing.assert_allclose(embed(pictures), one_by_one, rtol=1e-3, atol=1e-4)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 0.01


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth', which is not of FID's Inception: .* Missing key"):
        load_inception(str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match=r"nowhere.pth', which cannot be read"):
        load_inception("nowhere.pth")
