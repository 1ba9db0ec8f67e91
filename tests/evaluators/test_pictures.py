import numpy as np
from blocktune.evaluators.pictures import as_picture, sane_pictures
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)


def test_a_picture_keeps_its_bytes():
    for form in (NOISE, NOISE / 255, (NOISE / 255).astype(np.float32), Image.fromarray(NOISE)):
        picture = as_picture(form)
        assert picture is not None
        np.testing.assert_array_equal(np.asarray(picture), NOISE)


def test_what_is_no_picture_is_none():
    assert as_picture(np.full((8, 8, 3), np.nan)) is None
    assert as_picture(np.zeros((0, 8, 3))) is None


def test_sane_pictures_stand_at_their_positions():
    found = sane_pictures([np.zeros((8, 8, 3)), NOISE, np.full((8, 8, 3), np.nan), np.zeros((4, 4)), NOISE / 255])
    assert list(found) == [1, 4]
    for picture in found.values():
        np.testing.assert_array_equal(np.asarray(picture), NOISE)
