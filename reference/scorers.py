"""The learned scores of the reference world: small models of the classes of the published ones, trained on its scenes.

Registered as `clip_score:reference`, `hps_v2.1:reference`, `aesthetic_v2:reference` and `geneval-style:reference`: the
code that runs published weights, which cannot be shipped, on weights that can. `load_clip(PREFERENCE).images` is what
`cmmd` and `fid` may embed by. They know this world alone: of any other picture or sentence they say nothing.
"""

from pathlib import Path
from typing import TypeVar

from ..evaluators.aesthetic import AestheticV2
from ..evaluators.clip_scores import ClipScore, HpsV21
from ..evaluators.detection import InstanceDetector
from ..evaluators.geneval import GenEval
from ..evaluators.model_score import PictureScore

WEIGHTS = Path(__file__).parent / "weights"
CLIP = f"local-dir:{WEIGHTS / 'clip'}"
PREFERENCE = f"local-dir:{WEIGHTS / 'preference'}"
AESTHETIC = WEIGHTS / "aesthetic" / "head.pth"
DETECTOR = WEIGHTS / "detector"
PIXELS = 64  # what all of them see pictures scaled to: a multiple of 32, the stride of their coarsest features
E = TypeVar("E", bound=PictureScore | GenEval)


def _called(name: str, evaluator: E) -> E:
    """By a name without the folder that the weights are in, which records on two machines would differ in."""
    evaluator.name = name
    return evaluator


def clip_score() -> ClipScore:
    """Of the model that `reference/train_clip.py` made."""
    return _called("clip_score:reference", ClipScore(CLIP))


def hps() -> HpsV21:
    """The same model, tuned to put a picture above its degraded self."""
    return _called("hps_v2.1:reference", HpsV21(PREFERENCE))


def aesthetic() -> AestheticV2:
    """A head on the tuned model, for the other is blind to it: how little a picture is degraded, from 1 to 10."""
    return _called("aesthetic_v2:reference", AestheticV2(f"{AESTHETIC} with {PREFERENCE}"))


def geneval() -> GenEval:
    """By the detector that `reference/train_detector.py` made, colours by the model of `clip_score`."""
    evaluator = GenEval(detector=DETECTOR, clip=CLIP)
    evaluator.detector = InstanceDetector(DETECTOR, shortest=PIXELS, longest=PIXELS, batch=64)
    return _called("geneval-style:reference", evaluator)
