import json
import subprocess
import sys

import numpy as np
import pytest
from blocktune.evaluators import UnknownEvaluator, as_array, families, get, names, register
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

shapes = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.just(3))


@given(arrays(np.uint8, shapes))
def test_as_array_of_bytes_is_exact_for_every_form(images):
    expected = (images / 255).astype(np.float32)
    for form in (images, list(images), [Image.fromarray(image) for image in images], expected):
        array = as_array(form)
        assert array.dtype == np.float32
        if len(images) or form is images or form is expected:
            assert array.shape == images.shape
        np.testing.assert_allclose(array, expected.reshape(array.shape), rtol=0, atol=1e-7)
        np.testing.assert_array_equal(np.round(array * 255).astype(np.uint8), images.reshape(array.shape))


@given(arrays(st.sampled_from([np.float16, np.float32, np.float64]), shapes, elements=st.floats(width=16)))
def test_as_array_takes_floats_as_they_are(images):
    np.testing.assert_array_equal(as_array(images), images.astype(np.float32))


def test_as_array_of_nothing():
    assert as_array([]).shape == (0, 0, 0, 3)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_as_array_of_other_pil_modes(mode):
    picture = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    array = as_array([picture])
    assert array.shape == (1, 3, 4, 3)
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), r"shape \(2, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), r"shape \(8, 8, 3\)"),
        ([np.zeros((8, 8))], r"shape \(8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.int32), "dtype int32"),
        ([np.zeros((1, 1, 3), object)], "dtype object"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], r"sizes .*\(8, 8\), \(8, 9\)"),
    ],
)
def test_as_array_refuses(images, said):
    with pytest.raises(ValueError, match=said):
        as_array(images)


def test_built_in_names():
    assert {"sane", "psnr", "ssim", "shapes", "shapes_binary", "crispness"} <= set(names())


def test_unknown_name_lists_the_known():
    with pytest.raises(UnknownEvaluator, match=r"'shape'; accepted: .*sane.*shapes.*clip_score"):
        get("shape")


def test_families_are_names_that_a_checkpoint_may_follow():
    assert set(families()).isdisjoint(names())  # those need no download
    assert get("hps_v2.1").name == "hps_v2.1"
    assert get("clip_score:ViT-B-32/openai").name == "clip_score:ViT-B-32/openai"
    assert get("clip_score:ViT-B-32/openai") is not get("clip_score:ViT-B-16/openai")
    with pytest.raises(ValueError, match=r"registered as 'hps_v2\.1:' calls itself 'hps_v2\.1'"):
        get("hps_v2.1:")
    with pytest.raises(UnknownEvaluator, match="'clip:ViT-B-32/openai', which cannot be found"):
        get("clip:ViT-B-32/openai")


class Bright:
    name = "bright"
    direction = "maximize"
    needs_reference = False

    def score(self, images, prompts, reference=None):
        return as_array(images).mean(axis=(1, 2, 3), dtype=np.float64)


@pytest.fixture
def registry(monkeypatch):
    from blocktune.evaluators import registry

    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.setattr(registry, "_made", {})


@pytest.mark.usefixtures("registry")
def test_register():
    register("bright", Bright)
    register("bright", Bright)
    assert isinstance(get("bright"), Bright)
    assert "bright" in names()
    with pytest.raises(ValueError, match="'bright' already stands for"):
        register("bright", lambda: Bright())
    with pytest.raises(ValueError, match="target is 'module'"):
        register("other", "module")
    register("dim", Bright)
    with pytest.raises(ValueError, match="'dim' calls itself 'bright'"):
        get("dim")
    register("nothing", lambda: object())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="made a object, which lacks"):
        get("nothing")


@pytest.mark.usefixtures("registry")
def test_register_is_lazy():
    register("absent", "no_such_module:Thing")
    with pytest.raises(UnknownEvaluator, match="no_such_module"):
        get("absent")


def test_import_stays_light():
    code = "import sys, json, blocktune.evaluators; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    heavy = {"ray", "optuna", "mlflow", "open_clip", "scipy", "diffusers", "transformers", "pandas", "matplotlib"}
    assert heavy.isdisjoint(loaded)
