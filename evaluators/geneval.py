"""GenEval's judgement of a picture (Ghosh et al. 2023, arXiv 2310.11513, evaluate_images.py), and a dense one.

`judge` is a pure function of what a sentence asks for and what a detector saw; `GenEval` and `GenEvalBinary` are the
evaluators that detect, name colours and judge. The original's numbers come from the original's detector: with another
checkpoint than Mask2Former Swin-S for COCO the evaluators call themselves `geneval-style`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .color import ColorNamer
from .detection import Detection, InstanceDetector
from .evaluator import Images, check_lengths
from .metadata import read_metadata
from .pictures import sane_pictures
from .template import COLORS, metadata_of

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of one class
MARGIN = 0.1  # of both objects' sizes, taken off their distance
SWIN_S = "facebook/mask2former-swin-small-coco-instance"
CLIP = "ViT-L-14/openai"
_ALMOST = 0.95  # the most that a picture earns which is not right


@dataclass(frozen=True)
class Judgement:
    """`correct` is GenEval's answer, `reason` what it writes where wrong; `score` in [0, 1] is 1 exactly if correct."""

    correct: bool
    score: float
    reason: str


def threshold_of(metadata: Mapping[str, Any]) -> float:
    """A detection counts above this score, not at it."""
    return COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD


def seen(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> dict[str, list[Detection]]:
    """What counts, by class: the best 16 above the threshold, best first; of equal scores the later comes first."""
    kept: dict[str, list[Detection]] = {}
    ranked = sorted(enumerate(detections), key=lambda pair: (pair[1].score, pair[0]), reverse=True)
    for _, detection in ranked:
        of_class = kept.setdefault(detection.label, [])
        if detection.score > threshold_of(metadata) and len(of_class) < MAX_OBJECTS:
            of_class.append(detection)
    return kept


def judge(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> Judgement:
    """Whether a picture shows what a line of GenEval's metadata asks for.

    `detections` are all there are, before any threshold, with `color` set at least on those that a colour is asked of:
    the best `count` of the class. Clauses are independent of each other: one object may serve two of them. Of a class
    that is asked for, only the best `count` objects are looked at: of a red and a blue car, the surer one decides. An
    object is placed against its target's matched objects, every pair of which must stand so.

    The dense score is the mean over clauses. An include clause earns the mean of its parts: presence (each wanted
    object the share of the threshold that its detection reaches), colour (the share of wanted objects that have it),
    position (of each pair, how far it stands on the side asked for, up to where it counts; 0 without a matched target).
    An exclude clause earns the share of the objects found that may be there. A wrong picture earns at most 0.95.
    """
    objects = seen(metadata, detections)
    reasons: list[str] = []
    credits: list[float] = []
    matched: list[list[Detection] | None] = []  # per include clause
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        parts = [_presence(metadata, name, count, detections)]
        said = len(reasons)
        if len(found) < count:
            reasons.append(f"expected {name}>={count}, found {len(found)}")
        if "color" in clause:
            colors = [detection.color for detection in found]
            right = colors.count(clause["color"])
            parts.append(right / count)
            if said == len(reasons) and right < count:
                tally = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
                wanted = f"{clause['color']} {name}>={count}"
                reasons.append(f"expected {wanted}, found {right} {clause['color']}; and {tally}")
        if "position" in clause:
            relation, index = clause["position"]
            target = matched[index]
            pairs = [(a, b) for a in found for b in target or ()]
            parts.append(float(np.mean([_placed(relation, a, b) for a, b in pairs])) if pairs else 0.0)
            if said == len(reasons) and target is None:
                reasons.append(f"no target for {name} to be {relation}")
            elif said == len(reasons):
                wrong = next((pair for pair in pairs if relation not in relations(*pair)), None)
                if wrong:
                    stands = " and ".join(relations(*wrong))
                    reasons.append(f"expected {name} {relation} target, found {stands} target")
        matched.append(found if said == len(reasons) else None)
        credits.append(float(np.mean(parts)))
    for clause in metadata.get("exclude", ()):
        name, count, found = clause["class"], clause["count"], len(objects.get(clause["class"], []))
        if found >= count:
            reasons.append(f"expected {name}<{count}, found {found}")
        credits.append(min(1.0, (count - 1) / found) if found else 1.0)
    if not reasons:
        return Judgement(True, 1.0, "")
    return Judgement(False, min(float(np.mean(credits)), _ALMOST), "\n".join(reasons))


def relations(a: Detection, b: Detection) -> list[str]:
    """Where `a` stands from `b`: none, one or two of left of, right of, above, below.

    The offset of centres loses a tenth of both sizes on each axis, and is divided by its length before that: what
    remains along an axis must exceed 0.5.
    """
    dx, dy = _offset(a, b)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return [relation for relation, holds in held.items() if holds]


def _offset(a: Detection, b: Detection) -> tuple[float, float]:
    """Of `a` from `b`, without the margin, in parts of the whole offset's length; zeros where nothing remains."""
    low_a, high_a, low_b, high_b = (np.array(d.box[i : i + 2]) for d in (a, b) for i in (0, 2))
    offset = (low_a + high_a - low_b - high_b) / 2
    sizes = np.abs(high_a - low_a) + np.abs(high_b - low_b)
    rest = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(rest) < 1e-3).all():
        return 0.0, 0.0
    dx, dy = rest / np.linalg.norm(offset)
    return float(dx), float(dy)


def _placed(relation: str, a: Detection, b: Detection) -> float:
    dx, dy = _offset(a, b)
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return min(max(along / 0.5, 0.0), 1.0)


def _presence(metadata: Mapping[str, Any], name: str, count: int, detections: Sequence[Detection]) -> float:
    best = sorted((d.score for d in detections if d.label == name and d.score > 0), reverse=True)[:count]
    return sum(min(score / threshold_of(metadata), 1.0) for score in best) / count


class GenEval:
    """Evaluator `geneval`: the dense score. A picture that is not `sane` scores 0.

    What a prompt asks for stands in `metadata`, a file of GenEval's own format, or is read from GenEval's sentence
    template; any other prompt is refused with a ValueError. `detector` is a hub id or a folder, `clip` named
    as in `clip.py`; both are loaded on first use.
    """

    name: str
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False
    suffix = ""

    def __init__(self, metadata: str | Path | None = None, detector: str | Path = SWIN_S, clip: str = CLIP):
        self.metadata = read_metadata(metadata) if metadata is not None else {}
        self.detector = InstanceDetector(detector)
        self.colors = ColorNamer(clip)
        self.original = Path(detector).name == Path(SWIN_S).name
        self.name = ("geneval" if self.original else "geneval-style") + self.suffix

    def judge(self, images: Images, prompts: Sequence[str]) -> list[Judgement]:
        """One judgement per picture."""
        check_lengths(images, prompts)
        asked = [self.metadata.get(prompt) or metadata_of(prompt) for prompt in prompts]
        classes = [frozenset(c["class"] for k in ("include", "exclude") for c in m.get(k, ())) for m in asked]
        if prompts and self.original and not self.detector.is_swin_s_of_coco():
            raise ValueError(
                f"detector {self.detector.checkpoint!r} is not the Swin-S for COCO that its name says; accepted: "
                f"{SWIN_S}, or a folder of another name, which makes the scores geneval-style"
            )
        for prompt, names in zip(prompts, classes, strict=True):
            unseen = sorted(names - set(self.detector.labels)) if names else []
            if unseen:
                accepted = f"the classes of {self.detector.checkpoint}"
                raise ValueError(f"prompt {prompt!r} asks for {unseen[0]!r}; accepted: {accepted}")
        pictures = sane_pictures(images)
        found = self.detector.detect(list(pictures.values()), [classes[i] for i in pictures])
        judgements = [Judgement(False, 0.0, "not a sane picture")] * len(asked)
        for i, detections in zip(pictures, found, strict=True):
            judgements[i] = judge(asked[i], self._with_colors(pictures[i], asked[i], detections))
        return judgements

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """float64 `(n,)` in [0, 1]."""
        check_lengths(images, prompts, reference)
        return np.array([judgement.score for judgement in self.judge(images, prompts)], dtype=np.float64)

    def _with_colors(self, picture: Image.Image, metadata: dict, detections: list[Detection]) -> list[Detection]:
        """`detections`, those that a colour is asked of named by it."""
        objects = seen(metadata, detections)
        clauses = [clause for clause in metadata.get("include", ()) if "color" in clause]
        colored = {id(d) for clause in clauses for d in objects.get(clause["class"], [])[: clause["count"]]}
        wanted = [i for i, detection in enumerate(detections) if id(detection) in colored]
        for i, color in zip(wanted, self.colors.name(picture, [detections[i] for i in wanted]), strict=True):
            detections[i] = replace(detections[i], color=color)
        return detections


class GenEvalBinary(GenEval):
    """Evaluator `geneval_binary`: 1 for a right picture, 0 for a wrong one. GenEval's own total is the mean over tasks.

    Of the six tasks' means, that is, not of all pictures; the two differ where tasks have unequally many prompts.
    """

    suffix = "_binary"

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """float64 `(n,)`, 0 or 1."""
        check_lengths(images, prompts, reference)
        return np.array([judgement.correct for judgement in self.judge(images, prompts)], dtype=np.float64)
