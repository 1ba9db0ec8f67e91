"""A part of a probe: one change of the model on some prompts, and what of it lies in the run directory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..evaluators import get
from ..policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from ..policies.policy import WHOLE_RUN, ModelIdentity
from .config import Config
from .prompts import read_prompts
from .run_directory import RunDirectory
from .space import window_name

Action: TypeAlias = Skip | Reuse | ScaleText
Table: TypeAlias = Any  # a pandas DataFrame, whose annotations answer for every kind of index at once
Window: TypeAlias = tuple[float, float]
Case: TypeAlias = tuple[str, Window]  # an effect in a window
Scores: TypeAlias = Any  # by evaluator, of each picture: a table, or a dictionary of arrays
# Each action, given the scale that makes text louder, and which blocks are the best: those it helps or harms least, or
# for a disabled text those that need it most.
EFFECTS: dict[str, tuple[Callable[[float], Action], int]] = {
    "remove": (lambda s: Skip(), 1),
    "reuse": (lambda s: Reuse(every=2), 1),
    "disable": (lambda s: ScaleText(operand="input", scale=0.0), -1),  # the paper's: for all later blocks as well
    "disable locally": (lambda s: ScaleText(operand="logit", scale=0.0), -1),
    "enhance input": (lambda s: ScaleText(operand="input", scale=s), 1),
    "enhance key": (lambda s: ScaleText(operand="key", scale=s), 1),
    "enhance value": (lambda s: ScaleText(operand="value", scale=s), 1),
    "enhance logit": (lambda s: ScaleText(operand="logit", scale=s), 1),
}


@dataclass(frozen=True)
class Part:
    """One change to measure: an effect at some blocks in a window, on the first `images` prompts of a split."""

    effect: str
    blocks: tuple[int, ...]
    window: Window
    images: int
    split: str = "search"
    scale: float | None = None  # of the text, instead of the effect's own
    steps: int | None = None  # the unmodified model at so many, instead of the effect

    def __str__(self) -> str:
        return f"{self.effect} {list(self.blocks)}" if self.steps is None else f"{self.steps} steps"

    def policy(self, model: ModelIdentity, scale: float) -> BlockPolicy:
        """What it does, where an effect that makes text louder does so by `scale`."""
        action = EFFECTS[self.effect][0](scale)
        if self.scale is not None and isinstance(action, ScaleText):
            action = ScaleText(operand=action.operand, scale=self.scale)
        rules = (Rule(blocks=self.blocks, window=self.window, action=action),) if self.steps is None else ()
        return BlockPolicy(name=str(self), model=model, rules=rules)

    def file(self, model: ModelIdentity, scale: float) -> str:
        """What its scores are called in the run directory, however many pictures they are of."""
        steps = "" if self.steps is None else f"-{self.steps}"
        digest = hashlib.sha256(f"{self.policy(model, scale).digest}-{self.split}{steps}".encode()).hexdigest()
        return f"probe-{digest[:16]}"


class Parts:
    """What a run directory holds of a probe of `model`, and how it is read."""

    def __init__(self, config: Config, run: RunDirectory, model: ModelIdentity):
        self.config, self.run, self.model = config, run, model
        self.prompts = {split: read_prompts(config, split) for split in ("search", "confirm")}
        self.images = min(config.probe.images, *map(len, self.prompts.values()))
        names = config.objectives.alignment, config.objectives.quality, *config.objectives.reported
        # evaluators that compare with the unmodified picture; the first costs next to nothing, so it is always there
        self.similarities = tuple(n for n in dict.fromkeys(("psnr", *names)) if get(n).needs_reference)

    @property
    def cases(self) -> list[Case]:
        return [(effect, window) for window in self.config.probe.windows for effect in self.config.probe.effects]

    @staticmethod
    def unmodified(split: str) -> str:
        """What the pictures and scores of the unmodified model are called, which a search and its confirm know too."""
        return "unmodified" if split == "search" else "confirm-unmodified"

    def before(self, split: str) -> Table | None:
        """Scores of the unmodified model; None where there are none."""
        return self._read(self.unmodified(split))

    def name(self, part: Part) -> str:
        return part.file(self.model, self.config.probe.scale)

    def scores(self, part: Part) -> Table | None:
        """Those of a part that are known, of the first so many prompts.

        None where there are none, or those of a run that did not ask for all similarities yet.
        """
        table = self._read(self.name(part))
        return table if table is not None and {*self.similarities} <= {*table.columns} else None

    def gains(self, part: Part, scores: Scores, before: Table) -> np.ndarray:
        """How far each picture was helped, or needs the text, of shape (pictures,)."""
        name = self.config.objectives.alignment
        after = np.asarray(scores[name])[: part.images]
        return EFFECTS[part.effect][1] * (after - np.asarray(before[name])[: len(after)])

    def _read(self, name: str) -> Table | None:
        return self.run.read_scores(name) if (self.run.scores / f"{name}.parquet").exists() else None


def window_of(name: str) -> Window:
    """The window of that name; ValueError for what is none."""
    start, end = map(float, name.split("-"))
    return start, end


def at_window(effect: str, window: str) -> str:
    """An effect as a person is told of it: where it lasts the whole run, that needs no words."""
    return effect if window == window_name(WHOLE_RUN) else f"{effect} {window}"
