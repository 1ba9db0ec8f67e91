"""Evaluator `compositional`: a score for every kind of the prompt set that ships."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .evaluator import Images, check_lengths
from .geneval import CLIP, SWIN_S, GenEval
from .t2i_evaluators import BLIP, Attribute
from .template import metadata_of


class Compositional:
    """GenEval's dense score where the detector knows all things of a prompt, BLIP-VQA's where not (shape, texture).

    Both are in [0, 1] but not on one scale: compare differences kind by kind as well. Any other prompt than the set's
    sentences is refused as `geneval` refuses it.
    """

    name = "compositional"
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    def __init__(self, detector: str | Path = SWIN_S, clip: str = CLIP, blip: str = BLIP):
        self.geneval = GenEval(detector=detector, clip=clip)
        self.attribute = Attribute(blip)

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """float64 `(n,)` in [0, 1]."""
        check_lengths(images, prompts, reference)
        things = [{thing["class"] for thing in metadata_of(prompt)["include"]} for prompt in prompts]
        known = np.array([names <= {*self.geneval.detector.labels} for names in things], dtype=bool)
        scores = np.empty(len(prompts))
        for evaluator, chosen in ((self.geneval, known), (self.attribute, ~known)):
            index = np.flatnonzero(chosen).tolist()
            pictures: Any = [images[i] for i in index]
            scores[index] = evaluator.score(pictures, [prompts[i] for i in index])
        return scores
