"""What every score by a pretrained model holds to, on tiny random checkpoints in the formats of the published ones."""

import json
import os
import posixpath
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, families, get, names
from blocktune.evaluators.checkpoints import precision
from blocktune.reference.scenes import Object, render
from blocktune.reference.scorers import WEIGHTS
from PIL import Image

from .test_conformance import PROMPTS, EvaluatorConformance, pictures

TRAINED = {name: name for name in names() if name.endswith(":reference")}
FAMILIES = [*families(), "vqa_score blip"]
HALF = 0.02  # how far scores in half precision may be from those in single
SINGLE = "checkpoints.precision = lambda half=torch.float16: torch.float32; torch.backends.cudnn.allow_tf32 = False"
READS_PROMPTS = ["siglip_score", "hps_v2.1", "pick_score", "image_reward", "vqa_score", "vqa_score blip"]


@pytest.fixture(params=FAMILIES)
def name(request, model_scores) -> str:
    return model_scores[request.param]


class TestModelScores(EvaluatorConformance):
    @staticmethod
    def tolerance(name: str) -> float:
        """In half precision, as on a GPU, kernels round otherwise for another batch."""
        return 1e-5 if precision() == torch.float32 else HALF


def test_degenerate_pictures_get_the_worst_value(name):
    evaluator = get(name)
    images = pictures().astype(np.float32) / 255
    if not evaluator.needs_reference:  # what is asked for, which a trained model does not call the worst
        images[[0, 4]] = render([[Object("circle", "red", 24, 24, 8)]])[0].permute(1, 2, 0).numpy()
    images[1], images[2], images[3] = 0, np.nan, 1
    scores = evaluator.score(images, PROMPTS, pictures())
    sign = 1 if evaluator.direction == "maximize" else -1
    worst = [2] if evaluator.needs_reference else [1, 2, 3]  # a black picture can be compared, and differs
    assert (scores[worst] == evaluator.worst).all()
    assert (sign * scores[[0, 4]] > sign * evaluator.worst).all()
    assert (sign * scores[[1, 3]] < sign * scores[0]).all()


@pytest.mark.parametrize("family", READS_PROMPTS)
def test_prompts_matter_but_not_what_is_cut(family, model_scores):
    evaluator = get(model_scores[family])
    image = pictures()[:1]
    long = " ".join(["red circle"] * 60)
    scores = [evaluator.score(image, [prompt])[0] for prompt in ("", "a", "a blue square", long, long + " and a cat")]
    assert np.isfinite(scores).all()
    assert len(set(scores[:4])) == 4
    if family not in ("vqa_score", "vqa_score blip"):  # a question ends in what it asks for
        assert scores[3] == pytest.approx(scores[4], abs=1e-5)


@pytest.mark.parametrize("family", ["aesthetic_v1", "aesthetic_v2", "clip_iqa"])
def test_quality_never_reads_the_prompt(family, model_scores):
    evaluator = get(model_scores[family])
    assert (evaluator.score(pictures(), PROMPTS) == evaluator.score(pictures(), PROMPTS[::-1])).all()


def told_elsewhere(scored: dict[str, str], first: str = "", **environment: str) -> dict[str, dict[str, Any]]:
    """Scores of the same pictures by a process of its own, which does `first` before anything is loaded.

    And what that takes: modules with weights that are made, and checkpoints that are opened, before any score is asked
    for (`early`) and by the first of each evaluator; and which modules with weights it runs (`ran`).
    """
    code = """
import json, sys
import torch
from blocktune.evaluators import checkpoints
FIRST
import numpy as np
from blocktune.evaluators import get
names, prompts, images, reference = json.load(sys.stdin)
images, reference = np.array(images, np.uint8), np.array(reference, np.uint8)
folders = {part.rpartition(":")[2].rpartition("/")[0] for name in names.values() for part in name.split(" with ")}
folders = tuple(folder for folder in (*folders, *FOLDERS) if folder)
opened, made, ran = [], [], set()

def heard(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folders) and not str(arguments[0]).endswith("questions.jsonl"):
        opened.append(str(arguments[0]))

def noted(module, *arguments, **options):
    made.append(module)
    make(module, *arguments, **options)

def told():
    weighty = [type(m).__name__ for m in made if any(True for _ in m.parameters(recurse=False))]
    found = {"opened": [*opened], "made": weighty, "ran": [id(m) for m in ran]}
    opened.clear(), made.clear(), ran.clear()
    return found

sys.addaudithook(heard)
make, torch.nn.Module.__init__ = torch.nn.Module.__init__, noted
torch.nn.modules.module.register_module_forward_pre_hook(
    lambda module, _: ran.add(module) if any(True for _ in module.parameters(recurse=False)) else None
)
evaluators = {key: get(name) for key, name in names.items()}
results = {"early": told()}
kept = []  # so that no other module gets an id that was told
for key, evaluator in evaluators.items():
    scores = evaluator.score(images, prompts, reference if evaluator.needs_reference else None).tolist()
    kept.append([*made])
    results[key] = {"scores": scores} | told()
print(json.dumps(results))
"""
    sent = json.dumps([scored, PROMPTS, pictures().tolist(), pictures(1).tolist()])
    done = subprocess.run(
        [sys.executable, "-c", code.replace("FIRST", first).replace("FOLDERS", repr([str(WEIGHTS)]))],
        input=sent,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def scores_elsewhere(scored: dict[str, str], first: str = "", **environment: str) -> dict[str, list[float]]:
    return {key: told["scores"] for key, told in told_elsewhere(scored, first, **environment).items() if key != "early"}


def scores_here(scored: dict[str, str]) -> dict[str, np.ndarray]:
    return {
        key: get(name).score(pictures(), PROMPTS, pictures(1) if get(name).needs_reference else None)
        for key, name in scored.items()
    }


@pytest.fixture(scope="module")
def elsewhere(model_scores) -> dict[str, dict[str, Any]]:
    """Every family's score, and those of the reference world's models, by a process that has loaded nothing else."""
    return told_elsewhere(model_scores | TRAINED)


def test_another_process_gives_the_same_scores(model_scores, elsewhere):
    for key, scores in scores_here(model_scores | TRAINED).items():
        np.testing.assert_allclose(elsewhere[key]["scores"], scores, rtol=1e-5, atol=1e-5, err_msg=key)


def test_nothing_is_loaded_before_the_first_score(elsewhere):
    """No module with weights is made and no file of a checkpoint opened, for any evaluator; a first score does both."""
    assert elsewhere["early"] == {"opened": [], "made": [], "ran": []}
    own = ("lpips", "dinov2", "clip_iqa", "vqa_score blip", "clip_score", "siglip_score", "image_reward", "pick_score")
    for key in (*own, "vqa_score", "aesthetic_v2:reference", "geneval-style:reference"):
        assert elsewhere[key]["made"], key
        assert elsewhere[key]["opened"], key
    assert all(told["ran"] for key, told in elsewhere.items() if key != "early")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("clip_score", "aesthetic_v1"), ("clip_score", "aesthetic_v2"), ("clip_score", "hps_v2.1"),
        ("clip_score", "clip_score:reference"), ("vqa_score", "vqa_attributes"),
        ("aesthetic_v2:reference", "hps_v2.1:reference"),
    ],
)  # fmt: skip
def test_evaluators_of_the_same_weights_share_one_backbone(elsewhere, first, then):
    """The second makes no module with weights: it runs those of the first, the very same objects."""
    assert elsewhere[first]["made"]
    assert elsewhere[then]["made"] == []
    assert set(elsewhere[then]["ran"]) & set(elsewhere[first]["ran"])


def test_evaluators_of_other_weights_share_none(elsewhere):
    assert not set(elsewhere["clip_score"]["ran"]) & set(elsewhere["hps_v2.1:reference"]["ran"])
    assert not set(elsewhere["clip_score"]["ran"]) & set(elsewhere["siglip_score"]["ran"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: scores are in half precision anyway")
def test_half_precision_agrees(model_scores):
    """What a GPU computes in, here on the CPU."""
    half = scores_elsewhere(model_scores, "checkpoints.precision = lambda half=torch.float16: half")
    for key, scores in scores_here(model_scores).items():
        np.testing.assert_allclose(half[key], scores, rtol=HALF, atol=HALF, err_msg=key)
        if key != "lpips":  # in float32 everywhere
            assert half[key] != scores.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: its scores cannot be held against the CPU's")
def test_gpu_and_cpu_agree(model_scores):
    """To 1e-3 in single precision, and as half precision does in that of a GPU; `ssim` is in double on both.

    `geneval-style:reference` in single precision alone: in half, the colour of a thing may tip from one to another.
    """
    scored = model_scores | TRAINED | {"ssim": "ssim"}
    on_cpu, single = scores_elsewhere(scored, CUDA_VISIBLE_DEVICES=""), scores_elsewhere(scored, SINGLE)
    for key, scores in scores_here(scored).items():
        np.testing.assert_allclose(single[key], on_cpu[key], rtol=0, atol=1e-3, err_msg=key)
        if key == "ssim":
            np.testing.assert_allclose(scores, on_cpu[key], rtol=0, atol=1e-9)
        elif key != "geneval-style:reference":
            np.testing.assert_allclose(scores, on_cpu[key], rtol=HALF, atol=HALF, err_msg=key)


def test_names_can_be_metrics_of_mlflow(name):
    """Which takes no other characters, and no name that would change as a path."""
    assert re.fullmatch(r"[\w.\-/: ]+", name)
    assert posixpath.normpath(name) == name


def test_one_model_serves_all_transforms(model_scores):
    from blocktune.evaluators.clip import load_clip

    checkpoint = model_scores["clip_score"].partition(":")[2]
    models = {id(load_clip(checkpoint, **other).model) for other in ({}, {"resize_mode": "longest"})}
    assert len(models) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("clip_score", r"clip model is ''; accepted: ARCHITECTURE/TAG"),
        ("clip_score:ViT-B-33/openai", "'ViT-B-33/openai'; accepted: ARCHITECTURE/TAG"),
        ("clip_score:ViT-B-32/nowhere", "accepted after ViT-B-32/: openai, "),
        ("clip_score:ViT-B-32:nowhere.pt", "accepted after ViT-B-32: a file that is there"),
        ("siglip_score", r"clip model is ''"),
        ("vqa_score", "vqa_score lacks a model"),
        ("vqa_attributes:model", "lacks a part; accepted: vqa_attributes:MODEL with FILE"),
        ("vqa_attributes:model with nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("aesthetic_v1:head.pth with ViT-B-33/openai", "'ViT-B-33/openai'; accepted"),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_any_score(bad, said):
    with pytest.raises(CheckpointError, match=said):
        get(bad)


@pytest.mark.parametrize("family", ["pick_score", "dinov2", "vqa_score", "lpips", "aesthetic_v1", "clip_score"])
def test_a_checkpoint_that_is_not_there_is_refused(family, model_scores, tmp_path):
    where = {"clip_score": f"local-dir:{tmp_path}", "aesthetic_v1": f"{tmp_path}/x.pth with ViT-B-32/openai"}
    if family == "aesthetic_v1":
        where[family] = f"{tmp_path}/x.pth with {model_scores['clip_score'].partition(':')[2]}"
    evaluator = get(f"{family}:{where.get(family, tmp_path / 'x')}")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        evaluator.score(pictures(), PROMPTS, pictures(1) if evaluator.needs_reference else None)


def test_a_checkpoint_that_lacks_weights_is_refused(model_scores, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(model_scores["pick_score"].partition(":")[2])
    state = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of CLIPModel, as visual_projection\.weight"):
        get(f"pick_score:{tmp_path}").score(pictures(), PROMPTS)


def test_pil_pictures_of_several_sizes_are_scored_one_by_one(name):
    evaluator = get(name)
    sizes = [(48, 64), (64, 48), (48, 64), (64, 48)]
    images = [Image.fromarray(picture).resize(size) for picture, size in zip(pictures()[:4], sizes, strict=True)]
    reference = [image.rotate(90) for image in images] if evaluator.needs_reference else None
    together = evaluator.score(images, PROMPTS[:4], reference)
    alone = [
        evaluator.score(images[i : i + 1], PROMPTS[i : i + 1], reference and reference[i : i + 1])[0] for i in range(4)
    ]
    # in half precision other kernels, chosen by how many pictures there are, round otherwise
    relative, absolute = (HALF, HALF) if torch.cuda.is_available() else (0, 1e-5)
    np.testing.assert_allclose(together, alone, rtol=relative, atol=absolute)
