"""Scores by a cosine against their formulas, written out from the raw embeddings of the same weights."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from blocktune.evaluators import CheckpointError, get
from blocktune.evaluators.clip import _arguments, _of_file, load_clip
from open_clip.pretrained import _PRETRAINED
from PIL import Image
from torch.nn.functional import normalize

from . import checkpoints

PROMPTS = ["a red circle", "two blue squares, one above the other", ""]


def photos(sizes=((48, 40), (32, 32), (40, 64))) -> list[Image.Image]:
    """Smooth random pictures; a size is width, height."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture, size in zip(small, sizes, strict=True)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def raw_vectors(checkpoint: str, pictures=None) -> tuple[list[np.ndarray], list[np.ndarray], torch.nn.Module]:
    """What open_clip itself gives for each picture and prompt, and its model."""
    model, _, transform = open_clip.create_model_and_transforms(checkpoint)
    tokenizer = open_clip.get_tokenizer(checkpoint)
    with torch.no_grad():
        images = [model.eval().encode_image(transform(p)[None])[0].double().numpy() for p in pictures or photos()]
        texts = [model.encode_text(tokenizer([prompt]))[0].double().numpy() for prompt in PROMPTS]
    return images, texts, model


def test_clip_score(model_scores):
    name = model_scores["clip_score"]
    images, texts, _ = raw_vectors(name.partition(":")[2])
    expected = [100 * max(cosine(image, text), 0) for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(get(name).score(photos(), PROMPTS), expected, rtol=0, atol=1e-4)


def test_pictures_and_texts_are_embedded_as_by_open_clip_itself(model_scores, monkeypatch):
    """Though bytes become floats at once on the device, and a text that comes again is embedded once."""
    clip = load_clip(model_scores["clip_score"].partition(":")[2])
    with torch.inference_mode():
        pixels = torch.stack([clip.transform(picture) for picture in photos()])
        images = normalize(clip.model.encode_image(pixels), dim=-1)
        texts = normalize(clip.model.encode_text(clip.tokenizer(PROMPTS)), dim=-1)
    assert torch.equal(clip.images(photos()), images)
    embedded = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: embedded.append(len(tokens)) or encode(tokens))
    again = [2, 0, 0, 1, 2]
    torch.testing.assert_close(clip.texts([PROMPTS[i] for i in again]), texts[again], rtol=0, atol=1e-6)
    assert embedded == [len(PROMPTS)]


def test_clip_score_has_no_negative_values(tmp_path):
    checkpoint = checkpoints.clip(tmp_path / "clip")
    weights = Path(checkpoint.partition(":")[2]) / "open_clip_pytorch_model.bin"
    state = torch.load(weights)
    torch.save(state | {"text_projection": -state["text_projection"]}, weights)  # every cosine changes its sign
    images, texts, _ = raw_vectors(checkpoint)
    assert min(cosine(image, text) for image, text in zip(images, texts, strict=True)) < 0
    scores = get(f"clip_score:{checkpoint}").score(photos(), PROMPTS)
    expected = [100 * max(cosine(image, text), 0) for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_siglip_score(model_scores):
    name = model_scores["siglip_score"]
    images, texts, model = raw_vectors(name.partition(":")[2])
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    assert bias == -4
    logits = [scale * cosine(image, text) + bias for image, text in zip(images, texts, strict=True)]
    expected = [1 / (1 + np.exp(-logit)) for logit in logits]
    np.testing.assert_allclose(get(name).score(photos(), PROMPTS), expected, rtol=0, atol=1e-5)


def test_siglip_score_refuses_a_model_of_another_kind(model_scores):
    checkpoint = model_scores["clip_score"].partition(":")[2]
    with pytest.raises(CheckpointError, match="has no logit bias"):
        get(f"siglip_score:{checkpoint}").score(photos(), PROMPTS)


def padded(picture: Image.Image, size: int = 32) -> Image.Image:
    """The whole picture in a square with black at its sides."""
    ratio = size / max(picture.size)
    scaled = picture.resize([round(side * ratio) for side in picture.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
    return square


@pytest.fixture(scope="module")
def hps_checkpoint(tmp_path_factory) -> tuple[str, str]:
    """A file in the layout of HPS_v2.1_compressed.pt for a tiny architecture, and the folder of the same weights."""
    folder = tmp_path_factory.mktemp("hps")
    local = checkpoints.clip(folder / "clip")
    config = json.loads((folder / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    state = torch.load(folder / "clip" / "open_clip_pytorch_model.bin")
    torch.save({"state_dict": state, "epoch": 3, "name": "hps"}, folder / "hps.pt")
    return f"tiny-hps:{folder / 'hps.pt'}", local


def test_hps(hps_checkpoint):
    checkpoint, local = hps_checkpoint
    images, texts, _ = raw_vectors(local, [padded(picture) for picture in photos()])
    expected = [cosine(image, text) for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(get(f"hps_v2.1:{checkpoint}").score(photos(), PROMPTS), expected, rtol=0, atol=1e-5)


def test_a_file_for_another_architecture_is_refused(hps_checkpoint):
    file = hps_checkpoint[0].partition(":")[2]
    with pytest.raises(CheckpointError, match=r"ViT-B-32:/.*which cannot be loaded: .*width changed"):
        get(f"clip_score:ViT-B-32:{file}").score(photos(), PROMPTS)


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no weights")
    clip = f"ViT-B-32:{tmp_path / 'model.pt'}"
    for name in (f"clip_score:{clip}", f"aesthetic_v1:{tmp_path / 'model.pt'} with {clip}"):
        with pytest.raises(CheckpointError, match=f"{tmp_path}.* cannot be (loaded|read)"):
            get(name).score(photos(), PROMPTS)


def test_pick_score(model_scores):
    from transformers import CLIPModel, CLIPProcessor

    name = model_scores["pick_score"]
    folder = name.partition(":")[2]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(folder, backend="pil")
    expected = []
    for picture, prompt in zip(photos(), PROMPTS, strict=True):
        with torch.no_grad():
            image = model.get_image_features(**processor(images=picture, return_tensors="pt")).pooler_output[0]
            text = model.get_text_features(**processor(text=prompt, return_tensors="pt")).pooler_output[0]
        expected.append(model.logit_scale.exp().item() * cosine(image.double().numpy(), text.double().numpy()))
    np.testing.assert_allclose(get(name).score(photos(), PROMPTS), expected, rtol=0, atol=1e-4)


def test_weights_trained_with_quickgelu_are_run_with_it():
    quick = [
        (a, tag) for a, tags in _PRETRAINED.items() for tag, published in tags.items() if published.get("quick_gelu")
    ]
    assert ("ViT-B-32", "openai") in quick
    for architecture, tag in quick:
        assert _arguments(f"{architecture}/{tag}")["force_quick_gelu"] is True
    plain = _arguments("ViT-H-14/laion2b_s32b_b79k")
    assert plain["force_quick_gelu"] is False


def test_the_activation_changes_the_score(tmp_path):
    """What a model with the wrong activation would get away with."""
    scores = []
    for quick in (False, True):
        checkpoint = checkpoints.clip(tmp_path / str(quick), quick_gelu=quick)
        scores.append(get(f"clip_score:{checkpoint}").score(photos(), PROMPTS))
    assert (np.abs(scores[0] - scores[1]) > 1e-4).all()


def test_a_file_takes_the_transform_that_its_architecture_is_published_with():
    siglip = _of_file("ViT-B-16-SigLIP:/weights/model.pt", {})
    assert (siglip["resize_mode"], siglip["mean"]) == ("squash", (0.5, 0.5, 0.5))
    assert _of_file("ViT-B-16-SigLIP/webli", {}) == {}
    with pytest.raises(CheckpointError, match="whose tags differ in their transforms"):
        _of_file("ViT-L-14:/weights/model.pt", {})
    assert _of_file("ViT-H-14:/weights/hps.pt", {"mean": (0.5,) * 3, "std": (0.5,) * 3}) == {}


def test_a_model_from_a_file_sees_through_that_transform(hps_checkpoint, monkeypatch):
    published = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setitem(_PRETRAINED, "tiny-hps", {"one": published, "two": published | {"url": "elsewhere"}})
    picture = photos()[0]
    np.testing.assert_allclose(load_clip(hps_checkpoint[0]).transform(picture), squashed(picture), rtol=0, atol=1e-5)


def squashed(picture: Image.Image) -> np.ndarray:
    """A square of 32 pixels without its sides cut off, `(3, 32, 32)`, of mean 0.5 and deviation 0.25."""
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    return ((pixels - 0.5) / 0.25).transpose(2, 0, 1)


def test_every_clip_sees_with_its_own_transform(tmp_path):
    checkpoint = checkpoints.clip(tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_config.json"
    squash = {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.25] * 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": squash}))
    picture = photos()[0]
    np.testing.assert_allclose(load_clip(checkpoint).transform(picture), squashed(picture), rtol=0, atol=1e-5)
