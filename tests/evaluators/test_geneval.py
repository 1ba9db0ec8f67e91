"""GenEval's rules on detections written by hand, one table row per case of evaluate_images.py; then the evaluator."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blocktune.evaluators import get
from blocktune.evaluators.clip import load_clip
from blocktune.evaluators.color import GROUND, TEMPLATES, ColorNamer, crop
from blocktune.evaluators.detection import Detection, InstanceDetector
from blocktune.evaluators.geneval import GenEval, judge, relations
from blocktune.evaluators.metadata import read_metadata
from blocktune.evaluators.template import CLASSES as CLASSES_OF_COCO
from blocktune.evaluators.template import COLORS, metadata_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from .judges import CLASSES, TINY, clip, mask2former


def box(x: float, y: float, w: float = 10, h: float = 10) -> tuple[float, float, float, float]:
    return (x, y, x + w, y + h)


def seen(label: str, score: float = 0.95, color: str | None = None, at: tuple = (0, 0, 10, 10)) -> Detection:
    return Detection(label, at, score, color)


BENCH, CUP = seen("bench"), seen("cup")
RED, BLUE = seen("cup", color="red"), seen("cup", color="blue")


@pytest.mark.parametrize(
    ("text", "detections", "reason"),
    [
        # one object
        ("a photo of a bench", [BENCH], ""),
        ("a photo of a bench", [], "expected bench>=1, found 0"),
        ("a photo of a bench", [CUP], "expected bench>=1, found 0"),
        ("a photo of a bench", [BENCH, BENCH, CUP], ""),  # more of it, and other things, do no harm
        ("a photo of a bench", [seen("bench", 0.3)], "expected bench>=1, found 0"),  # at the threshold is not above it
        ("a photo of a bench", [seen("bench", 0.3 + 1e-9)], ""),
        ("a photo of a bench", [seen("bench", float("nan"))], "expected bench>=1, found 0"),
        # two objects
        ("a photo of a bench and a cup", [BENCH, CUP], ""),
        ("a photo of a bench and a cup", [BENCH], "expected cup>=1, found 0"),
        ("a photo of a bench and a cup", [], "expected bench>=1, found 0\nexpected cup>=1, found 0"),
        ("a photo of a cup and a cup", [CUP], ""),  # clauses are independent: one cup serves both
        # counting: 0.9, and neither more nor fewer
        ("a photo of two cups", [CUP, CUP], ""),
        ("a photo of two cups", [CUP], "expected cup>=2, found 1"),
        ("a photo of two cups", [CUP, CUP, CUP], "expected cup<3, found 3"),
        ("a photo of two cups", [CUP, CUP, seen("cup", 0.9)], ""),
        ("a photo of two cups", [CUP, seen("cup", 0.9)], "expected cup>=2, found 1"),
        ("a photo of two cups", [CUP] * 40, "expected cup<3, found 16"),  # at most 16 of one class
        # colours: of the surest alone
        ("a photo of a red cup", [RED], ""),
        ("a photo of a red cup", [BLUE], "expected red cup>=1, found 0 red; and 1 blue"),
        ("a photo of a red cup", [], "expected cup>=1, found 0"),
        (
            "a photo of a red cup",
            [seen("cup", 0.5, "red"), seen("cup", 0.6, "blue")],
            "expected red cup>=1, found 0 red; and 1 blue",
        ),
        ("a photo of a red cup", [seen("cup", 0.6, "red"), seen("cup", 0.5, "blue")], ""),
        # of equally sure ones the later is looked at first
        ("a photo of a red cup", [BLUE, RED], ""),
        ("a photo of a red cup", [RED, BLUE], "expected red cup>=1, found 0 red; and 1 blue"),
        ("a photo of two red cups", [RED, BLUE], "expected red cup>=2, found 1 red; and 1 red, 1 blue"),
        ("a photo of two red cups", [RED, RED, RED], "expected cup<3, found 3"),
        ("a photo of a red bench and a blue cup", [seen("bench", color="red"), BLUE], ""),
        (
            "a photo of a red bench and a blue cup",
            [seen("bench", color="blue"), RED],
            "expected red bench>=1, found 0 red; and 1 blue\nexpected blue cup>=1, found 0 blue; and 1 red",
        ),
        # positions
        ("a photo of a bench left of a cup", [seen("bench", at=box(0, 0)), seen("cup", at=box(30, 0))], ""),
        (
            "a photo of a bench left of a cup",
            [seen("bench", at=box(30, 0)), seen("cup", at=box(0, 0))],
            "expected bench left of target, found right of target",
        ),
        ("a photo of a bench left of a cup", [BENCH], "expected cup>=1, found 0\nno target for bench to be left of"),
        ("a photo of a bench left of a cup", [CUP], "expected bench>=1, found 0"),  # and nothing of the position
        (
            "a photo of a bench left of a cup",
            [BENCH, CUP],
            "expected bench left of target, found  target",  # one upon the other stand nowhere
        ),
        ("a photo of a bench above a cup", [seen("bench", at=box(0, 0)), seen("cup", at=box(20, 25))], ""),
        ("a photo of a bench left of a cup", [seen("bench", at=box(0, 0)), seen("cup", at=box(20, 25))], ""),
    ],
)
def test_judges_as_the_original(text, detections, reason):
    judgement = judge(metadata_of(text), detections)
    assert (judgement.correct, judgement.reason) == (reason == "", reason)
    assert (judgement.score == 1) == judgement.correct


@pytest.mark.parametrize(
    ("a", "b", "held"),
    [
        (box(0, 0), box(30, 0), ["left of"]),
        (box(30, 0), box(0, 0), ["right of"]),
        (box(0, 0), box(0, 30), ["above"]),
        (box(0, 30), box(0, 0), ["below"]),
        (box(0, 0), box(30, 30), ["left of", "above"]),  # (30 - 2) / 42.4 = 0.66 on both axes
        (box(0, 0), box(0, 0), []),
        (box(0, 0), box(2, 0), []),  # 2 - 0.1 * 20: the margin eats it all
        (box(0, 0), box(4, 0), []),  # (4 - 2) / 4 is 0.5, not more
        (box(0, 0), box(4.01, 0), ["left of"]),
        (box(0, 0), box(2.0009, 0), []),  # less than a thousandth of a pixel remains
        (box(0, 0), box(30, 14), ["left of"]),  # dy: (14 - 2) / 33.1 = 0.36
        (box(-5, -5, 10, 10), box(507, 0, 10, 10), ["left of"]),  # at the rim
        ((10, 10, 0, 0), box(30, 0), ["left of"]),  # corners the other way round: sizes are absolute
        (box(0, 0, 1, 1), box(100, 0, 900, 10), ["left of"]),  # (549.5 - 90.1) / 549.5
    ],
)
def test_relations(a, b, held):
    assert relations(seen("bench", at=a), seen("cup", at=b)) == held


@pytest.mark.parametrize(
    ("text", "detections", "score"),
    [
        ("a photo of a bench", [seen("bench", 0.15)], 0.5),
        ("a photo of a bench", [seen("bench", 0.3)], 0.95),  # nothing is missing, and yet it is not right
        ("a photo of a bench and a cup", [BENCH, seen("cup", 0.15)], 0.75),
        ("a photo of two cups", [CUP], 0.75),  # half of the cups are there, and not too many
        ("a photo of two cups", [CUP, seen("cup", 0.45)], 0.875),
        ("a photo of two cups", [CUP] * 4, (1 + 2 / 4) / 2),
        ("a photo of a red cup", [BLUE], 0.5),
        ("a photo of a red bench and a blue cup", [BLUE], 0.5),
        ("a photo of a bench left of a cup", [BENCH, CUP], (1 + 0.5) / 2),
        ("a photo of a bench left of a cup", [seen("bench", at=box(0, 0)), seen("cup", at=box(8 / 3, 0))], 0.875),
        ("a photo of a bench left of a cup", [seen("bench", at=box(0, 0)), seen("cup", at=box(4, 0))], 0.95),
        ("a photo of a bench left of a cup", [], 0),
    ],
)
def test_partial_credit_by_hand(text, detections, score):
    judgement = judge(metadata_of(text), detections)
    assert not judgement.correct
    assert judgement.score == pytest.approx(score, abs=1e-9)


boxes = st.tuples(*[st.floats(0, 100)] * 4)
detected = st.builds(
    Detection, st.sampled_from(["bench", "cup"]), boxes, st.floats(0, 1), st.sampled_from(["red", "blue"])
)
texts = st.sampled_from(
    [
        "a photo of a bench",
        "a photo of a bench and a cup",
        "a photo of three cups",
        "a photo of a red cup",
        "a photo of a red bench and a blue cup",
        "a photo of a bench above a cup",
    ]
)


@given(texts, st.lists(detected, max_size=6))
def test_score_is_one_exactly_when_right(text, detections):
    judgement = judge(metadata_of(text), detections)
    assert 0 <= judgement.score <= 1
    assert (judgement.score == 1) == judgement.correct == (judgement.reason == "")


@given(texts, st.lists(detected, max_size=6, unique_by=lambda d: d.score), st.randoms(use_true_random=False))
def test_order_and_other_things_do_not_matter(text, detections, random):
    before = judge(metadata_of(text), detections)
    others = [*detections, seen("dog"), seen("cat", 0.2)]
    random.shuffle(others)
    assert judge(metadata_of(text), others) == before


def test_metadata_may_ask_for_what_no_sentence_says():
    metadata = {"tag": "colors", "include": [], "exclude": [{"class": "cup", "count": 1}], "prompt": "no cup"}
    assert judge(metadata, [BENCH]).correct
    assert judge(metadata, [CUP]).reason == "expected cup<1, found 1"
    assert judge({"tag": "colors", "prompt": ""}, []).correct  # nothing asked, nothing missing


# the evaluator


def picture(seed: int = 0, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_names_tell_the_checkpoint():
    assert get("geneval").name == "geneval"
    assert get("geneval_binary").name == "geneval_binary"
    assert GenEval(detector="/models/mask2former-swin-small-coco-instance").name == "geneval"
    assert GenEval(detector="facebook/mask2former-swin-large-coco-instance").name == "geneval-style"
    assert TINY["geneval-style_binary"]().name == "geneval-style_binary"


def test_a_name_does_not_make_another_checkpoint_the_original(tmp_path):
    (tmp_path / "mask2former-swin-small-coco-instance").symlink_to(mask2former(), target_is_directory=True)
    evaluator = GenEval(detector=tmp_path / "mask2former-swin-small-coco-instance", clip=clip())
    with pytest.raises(
        ValueError, match="is not the Swin-S for COCO that its name says; accepted: facebook/mask2former"
    ):
        evaluator.score([picture()], ["a photo of a circle"])


def test_the_original_is_known_by_its_shape_and_classes():
    """Of the real sizes, without weights; COCO's classes in the spelling of the published checkpoint."""
    from transformers import Mask2FormerConfig, SwinConfig

    voc = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
    voc |= {"dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote"}
    voc |= {"computer keyboard": "keyboard"}
    labels = dict(enumerate(voc.get(name, name) for name in CLASSES_OF_COCO))
    for depths, original in (([2, 2, 18, 2], True), ([2, 2, 6, 2], False)):
        backbone = SwinConfig(embed_dim=96, depths=depths, num_heads=[3, 6, 12, 24])
        config = Mask2FormerConfig(backbone_config=backbone, id2label=labels)
        detector = InstanceDetector("none")
        detector.model = SimpleNamespace(config=config)
        assert detector.is_swin_s_of_coco() == original
        assert detector.labels == CLASSES_OF_COCO


def test_labels_have_genevals_names():
    labels = TINY["geneval-style"]().detector.labels
    assert labels == (*CLASSES[:-2], "motorcycle", "computer keyboard")


def test_scores_are_the_rules_of_what_is_detected():
    evaluator = TINY["geneval-style"]()
    images, prompts = (
        [picture(i) for i in range(3)],
        ["a photo of a circle", "a photo of a red ring", "a photo of two rings"],
    )
    judgements = evaluator.judge(images, prompts)
    for image, prompt, judgement in zip(images, prompts, judgements, strict=True):
        wanted = metadata_of(prompt)
        (found,) = evaluator.detector.detect([Image.fromarray(image)], [{wanted["include"][0]["class"]}])
        assert found
        found = [
            Detection(d.label, d.box, d.score, evaluator.colors.name(Image.fromarray(image), [d])[0]) for d in found
        ]
        assert judge(wanted, found).reason == judgement.reason
        assert judge(wanted, found).score == pytest.approx(judgement.score, abs=1e-5)
    binary = TINY["geneval-style_binary"]().score(images, prompts)
    assert binary.tolist() == [float(judgement.correct) for judgement in judgements]


def test_instances_are_read_from_logits():
    """Two classes and none; query 1 covers the picture's right half, query 0 its one lower left pixel."""
    detector = TINY["geneval-style"]().detector
    classes = torch.full((3, len(CLASSES) + 1), -1e4)
    classes[0, 1] = 0.0  # square, surely
    classes[1, 3], classes[1, 5] = 0.0, -1.0  # ring, or a triangle
    classes[2, -1] = 0.0  # nothing
    masks = torch.full((3, 8, 8), -5.0)
    masks[0, 7, 0] = 3.0
    masks[1, :, 4:] = 2.0
    found = detector._read(classes, masks, (8, 8), {"square", "ring", "triangle"})
    ring, square = torch.tensor([0.0, -1.0]).softmax(0)[0].item(), torch.tensor(3.0).sigmoid().item()
    by_label = {d.label: d for d in found if d.score > 1e-6}
    assert by_label.keys() == {"square", "ring", "triangle"}
    assert by_label["square"].box == (0, 7, 1, 8)
    assert by_label["square"].score == pytest.approx(square)
    assert by_label["ring"].box == by_label["triangle"].box == (4, 0, 8, 8)
    assert by_label["ring"].score == pytest.approx(ring * torch.tensor(2.0).sigmoid().item())
    mask = by_label["ring"].mask
    assert mask is not None
    assert mask[:, 4:].all()
    assert not mask[:, :4].any()
    assert {d.label for d in detector._read(classes, masks, (8, 8), {"ring"})} == {"ring"}
    assert detector._read(classes, torch.full((3, 8, 8), -5.0), (8, 8), {"ring"}) == []  # a mask of no pixel


def test_preprocessing_is_that_of_the_original():
    model, processor = InstanceDetector(mask2former()).model, AutoImageProcessor.from_pretrained(mask2former())
    size = InstanceDetector(mask2former()).size
    shapes = {(1024, 1024): (800, 800), (512, 512): (800, 800), (512, 2048): (352, 1344)}
    for (height, width), expected in shapes.items():
        pixels = processor([Image.new("RGB", (width, height))], size=size, size_divisor=32, return_tensors="pt")
        assert pixels.pixel_values.shape[-2:] == expected
    assert not model.training


def test_colours_are_the_nearest_of_ten_by_three_sentences_each():
    namer = ColorNamer(clip())
    image = Image.fromarray(picture())
    detections = [seen("ring", at=(4, 4, 30, 40)), seen("cross", at=(0, 0, 48, 48))]
    named = namer.name(image, detections)
    for detection, name in zip(detections, named, strict=True):
        vectors = []
        for color in COLORS:
            texts = [template.format(color=color, label=detection.label) for template in TEMPLATES]
            mean = load_clip(clip()).texts(texts).double().numpy().mean(0)
            vectors.append(mean / np.linalg.norm(mean))
        (vector,) = load_clip(clip()).images([crop(image, detection)]).double().numpy()
        assert name == COLORS[int(np.argmax(vectors @ vector))]
    assert namer.name(image, []) == []
    assert TEMPLATES[1].format(color="red", label="ring") == "a photo of a red-colored ring"


def test_crops_are_grey_outside_of_the_mask():
    image = Image.fromarray(picture())
    mask = np.zeros((48, 48), bool)
    mask[10:20, 10:14] = True
    cut = np.asarray(crop(image, Detection("ring", (8, 10, 14, 20), 1.0, mask=mask)))
    assert cut.shape == (10, 6, 3)
    assert (cut[:, :2] == GROUND).all()
    np.testing.assert_array_equal(cut[:, 2:], picture()[10:20, 10:14])
    assert crop(image, seen("ring", at=(5, 5, 6, 6))).size == (1, 1)
    assert crop(image, seen("ring", at=(5.2, 5.2, 5.4, 5.4))).size == (1, 1)
    assert len(ColorNamer(clip()).name(image, [seen("ring", at=(5, 5, 6, 6))])) == 1


def test_crops_at_the_rim_and_over_it():
    image = Image.fromarray(picture())
    np.testing.assert_array_equal(np.asarray(crop(image, seen("ring", at=(38, 38, 48, 48)))), picture()[38:, 38:])
    over = np.asarray(crop(image, seen("ring", at=(-5, 40, 10, 60))))
    assert over.shape == (20, 15, 3)
    np.testing.assert_array_equal(over[:8, 5:], picture()[40:, :10])
    assert (over[8:] == 0).all()
    assert (over[:, :5] == 0).all()


def test_of_two_equally_near_colors_the_first_is_named(monkeypatch):
    namer, image, detection = ColorNamer(clip()), Image.fromarray(picture()), seen("ring", at=(4, 4, 40, 40))
    (vector,) = load_clip(clip()).images([crop(image, detection)]).double().numpy()
    near = np.stack([vector if color in ("blue", "pink") else -vector for color in COLORS])
    monkeypatch.setattr(namer, "of_label", lambda label: near)
    assert namer.name(image, [detection]) == ["blue"]


@pytest.mark.parametrize("name", ["geneval-style", "geneval-style_binary"])
def test_broken_pictures_score_nothing(name):
    broken = [np.zeros((48, 48, 3), np.uint8), np.full((48, 48, 3), np.nan), np.full((48, 48), 7, np.uint8)]
    scores = TINY[name]().score([*broken, picture(size=(31, 77))], ["a photo of a circle"] * 4)
    assert (scores[:3] == 0).all()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt is ''; accepted: 'a photo of '"),
        ("a circle", "prompt is 'a circle'; accepted: 'a photo of '"),
        ("a photo of a circle and a walrus", "asks for 'walrus'; accepted: the classes of .*mask2former"),
        ("a photo of a " + "very " * 90 + "circle", "asks for 'very very .*'; accepted: the classes of"),
    ],
)
def test_refuses_prompts_it_cannot_judge(prompt, said):
    with pytest.raises(ValueError, match=said):
        TINY["geneval-style"]().score([picture()], [prompt])


def test_metadata_from_the_benchmarks_own_file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [
        {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "rings are nice"},
        metadata_of("a photo of a cross left of a ring"),
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_metadata(path).values()) == lines
    evaluator = GenEval(path, detector=mask2former(), clip=clip())
    evaluator.detector = TINY["geneval-style"]().detector
    long_and_free = TINY["geneval-style"]().score([picture()], ["a photo of a ring"])
    np.testing.assert_allclose(evaluator.score([picture()], ["rings are nice"]), long_and_free, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", ":1 is not JSON"),
        ("[]", r":1 is '\[\]'; accepted: an object with tag, include and prompt"),
        ('{"tag": "colors"}', "accepted: an object with tag, include and prompt"),
        (
            '{"tag": "t", "prompt": "p", "include": [{"count": 1}]}',
            r"include\[0\] is .*; accepted: an object with class",
        ),
        ('{"tag": "t", "prompt": "p", "include": [{"class": "cup", "count": 0}]}', r"include\[0\].count is 0"),
        ('{"tag": "t", "prompt": "p", "exclude": [{"class": "cup"}]}', r"exclude\[0\].count is None"),
        (
            '{"tag": "t", "prompt": "p", "include": [{"class": "cup", "count": 1, "color": "teal"}]}',
            r"include\[0\].color is 'teal'; accepted: red",
        ),
        (
            '{"tag": "t", "prompt": "p", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}',
            r"include\[0\].position is \['above', 0\]; accepted: \[relation, an earlier clause\]",
        ),
        ("", "holds no metadata"),
    ],
)
def test_metadata_refuses(tmp_path, line, said):
    path = tmp_path / "metadata.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=said):
        read_metadata(path)
