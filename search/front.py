"""Which candidates no other beats, how much space they command, and the named picks among the confirmed."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from optuna._hypervolume import compute_hypervolume
from scipy.special import ndtr, ndtri

from ..evaluators import Interval, paired_interval
from .config import Config, Objectives

# how like the unmodified picture: a difference to the unmodified model says nothing of these
_FIDELITY = ("psnr", "ssim", "lpips", "dinov2")


@dataclass(frozen=True)
class Point:
    """A measured candidate on the axes: means per picture, and seconds per batch."""

    name: str
    alignment: float
    quality: float
    latency: float
    key: str = ""
    steps: int = 0
    anchor: bool = False
    guidance_scale: float | None = None  # None is the model's own

    @property
    def losses(self) -> tuple[float, float, float]:
        return (-self.alignment, -self.quality, self.latency)


@dataclass(frozen=True)
class Baseline(Point):
    """The unmodified model; `scales` are what counts as 100 points of alignment and of quality."""

    scales: tuple[float, float] = field(kw_only=True)

    def points(self, point: Point) -> tuple[float, float]:
        """How much more alignment and quality `point` has, in points."""
        gains = point.alignment - self.alignment, point.quality - self.quality
        return 100 * gains[0] / self.scales[0], 100 * gains[1] / self.scales[1]

    def cautious(self, point: Point, differences: np.ndarray) -> Point:
        """`point` with alignment and quality lower by the standard error of what they differ from the unmodified model.

        `differences` are of its pictures, in shares of 100 points: `(n, 2)`.
        """
        alignment, quality = self.scales * differences.std(axis=0, ddof=1) / np.sqrt(len(differences))
        return replace(point, alignment=point.alignment - alignment, quality=point.quality - quality)


@dataclass(frozen=True)
class Confirmed:
    """A candidate on held-out prompts and new seeds, against the unmodified model picture by picture."""

    name: str
    key: str
    steps: int
    anchor: bool
    rules: int
    alignment: Interval
    quality: Interval
    reported: dict[str, Interval]
    seconds: float  # measured, per batch
    speedup: float  # unmodified over this, in the same turn; the median over turns
    predicted_speedup: float
    picks: list[str] = field(default_factory=list)
    neighbours: dict[str, float] = field(default_factory=dict)  # how many, and what the worst lost of each score
    transfer: list[dict[str, Any]] = field(default_factory=list)  # settings, and the differences there in points
    best_of: list[dict[str, Any]] = field(default_factory=list)  # how many, how fast, and the differences in points
    guidance_scale: float | None = None  # None is the model's own
    bootstrap: Interval | None = None  # of alignment, beside the t interval
    p_values: dict[str, float] = field(default_factory=dict)  # of differences, Holm-corrected over all confirmed
    cmmd: float | None = None  # of all pictures to the unmodified model's
    fid: float | None = None  # as well
    transformer_seconds: float | None = None  # of `seconds`, in the forwards of the transformer
    transformer_speedup: float | None = None

    def holds(self, margin: float, quality_margin: float) -> bool:
        """Whether neither alignment nor quality loses more than its margin, by the lower ends of their intervals."""
        lows = self.alignment.in_points[1], self.quality.in_points[1]
        return lows[0] >= -100 * margin and lows[1] >= -100 * quality_margin

    def intervals(self, objectives: Objectives) -> dict[str, Interval]:
        """What was measured by the names of the evaluators."""
        return {objectives.alignment: self.alignment, objectives.quality: self.quality} | self.reported

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        return told if self.guidance_scale is not None else {k: v for k, v in told.items() if k != "guidance_scale"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Confirmed":
        fields: dict[str, Any] = {k: Interval(**data[k]) for k in ("alignment", "quality")}
        fields["reported"] = {k: Interval(**v) for k, v in data["reported"].items()}
        if data.get("bootstrap"):
            fields["bootstrap"] = Interval(**data["bootstrap"])
        return cls(**data | fields)


def is_fidelity(name: str) -> bool:
    """Whether the evaluator tells how like a picture is to the unmodified one: no difference then, but a value."""
    return name.partition(":")[0] in _FIDELITY


def held_out_name(member: Point | Confirmed) -> str:
    """Under what name the held-out scores and pictures of `member` lie in the run directory."""
    return f"confirm-{short(member.key)}"


def name_of(number: int, attributes: Mapping[str, Any]) -> str:
    """What a trial is called: a known point by where it is from, any other by its number."""
    return attributes.get("anchor") or attributes.get("origin") or f"trial {number}"


def slug(name: str) -> str:
    """The name of a candidate as files and addresses spell it."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def short(key: str) -> str:
    """A candidate's key in names of files: the first digits of the policy's digest, and its sampling in full."""
    digest, dash, sampling = key.partition("-")
    return digest[:16] + dash + sampling


def beside_steps(scale: float | None) -> str:
    """What is told of guidance behind the number of steps: nothing where it is the model's own."""
    return "" if scale is None else f", guidance {scale:g}"


def guidance_column(point: Point, config: Config) -> dict[str, float]:
    """The scale of guidance in a table, where the space has a choice of it."""
    own, scale = config.generation.guidance_scale, point.guidance_scale
    return {"guidance_scale": own if scale is None else scale} if config.space.guidance_scale else {}


def extended(front: list[Point], point: Point) -> list[Point]:
    """The front once `point` has come, fastest first; of equal points the first stays."""

    def matches(one: Point, other: Point) -> bool:
        return all(a <= b for a, b in zip(one.losses, other.losses, strict=True))

    if any(matches(member, point) for member in front):
        return front
    return sorted([*(m for m in front if not matches(point, m)), point], key=lambda p: p.latency)


def non_dominated(points: Iterable[Point]) -> list[Point]:
    """Points that no other matches on every axis and beats on one; of equal points the first. Fastest first."""
    front: list[Point] = []
    for point in points:
        front = extended(front, point)
    return front


def hypervolume(points: list[Point], baseline: Baseline) -> float:
    """Volume commanded beyond 10 points less alignment and quality than the unmodified model, at its latency.

    In point x point x share of latency saved; 100 points and all the time saved at no loss would be about 100.
    """
    reference = np.array([10.0, 10.0, 1.0])
    gains = ((*baseline.points(p), p.latency / baseline.latency) for p in points)
    losses = np.array([(-alignment, -quality, latency) for alignment, quality, latency in gains])
    losses = losses[(losses < reference).all(axis=1)] if len(losses) else losses
    return float(compute_hypervolume(losses, reference)) / 100 if len(losses) else 0.0


def chance_to_hold(
    differences: np.ndarray, prompts: Sequence[str], pictures: int, compared: int, margins: tuple[float, float]
) -> float:
    """How likely a candidate holds on so many held-out `pictures`, one of `compared`, by what it showed in the search.

    `differences` to the unmodified model are of alignment and quality in shares of 100 points, `(n, 2)`, as `margins`
    are. Both means are off, that of the search and that to come, and the lower end of its interval has to stay within
    the margin; normal errors, and the two scores apart.
    """
    level, chance = 1 - 0.05 / compared, 1.0
    for values, margin in zip(differences.T, margins, strict=True):
        interval = paired_interval(values, np.zeros(len(values)), groups=prompts, level=level)
        half, shrinks = interval.high - interval.delta, math.sqrt(len(values) / pictures)
        slack = interval.delta + margin - half * shrinks
        error = half / float(ndtri((1 + level) / 2)) * math.sqrt(1 + shrinks**2)
        chance *= float(ndtr(slack / error)) if error else float(slack >= 0)
    return chance


def shortlist(
    candidates: list[Point], baseline: Baseline, count: int, chances: Mapping[str, float], beside: Sequence[Point] = ()
) -> list[Point]:
    """`count` candidates worth confirming, fastest first, besides those that are confirmed anyway.

    Half of them are the fastest that are almost sure to hold, by the `chances` of each key, the fastest that are
    likely to, and so on down to an even chance; the others are members of the front that command the most hypervolume.
    What commands most is what is fastest, and often loses too much to be a pick.
    """
    chosen: list[Point] = []
    for sure in np.linspace(0.95, 0.5, (count + 1) // 2):
        able = [p for p in (baseline, *beside, *candidates) if p is baseline or chances[p.key] >= sure]
        fastest = min(able, key=lambda p: p.latency)
        if fastest is not baseline and fastest not in (*beside, *chosen):
            chosen.append(fastest)
    front = non_dominated([baseline, *beside, *candidates])
    return spread([p for p in front if p not in beside], baseline, count, chosen)


def spread(front: list[Point], baseline: Baseline, count: int, already: Sequence[Point] = ()) -> list[Point]:
    """The `count` members, those `already` chosen among them, that command most hypervolume, picked greedily."""
    chosen = [*already]
    rest = [p for p in front if p.key != baseline.key and p not in chosen]
    while rest and len(chosen) < count:
        best = max(rest, key=lambda p: (hypervolume([*chosen, p], baseline), -p.latency))
        chosen.append(best)
        rest.remove(best)
    return sorted(chosen, key=lambda p: p.latency)


def pick(confirmed: list[Confirmed], margin: float, quality_margin: float) -> dict[str, Confirmed]:
    """`quality`, `balanced` and `fast` among what held; a name is missing where nothing earned it.

    Only policies that change something count, and none that the unmodified model, at whatever steps and guidance it was
    confirmed, beats on alignment and measured speed.
    `quality`: the largest gain of alignment whose interval lies above zero. `fast`: the largest measured speed-up above
    one. `balanced`: the best product of speed-up and alignment, a point of alignment counting as 5 % of speed.
    """
    plain = [c for c in confirmed if not c.rules]
    earned = [
        c
        for c in confirmed
        if c.rules
        and c.holds(margin, quality_margin)
        and not any(a.speedup >= c.speedup and a.alignment.delta >= c.alignment.delta for a in plain)
    ]
    picks: dict[str, Confirmed] = {}
    better = [c for c in earned if c.alignment.low > 0]
    if better:
        picks["quality"] = max(better, key=lambda c: c.alignment.delta)
    faster = [c for c in earned if c.speedup > 1]
    if faster:
        picks["balanced"] = max(faster, key=lambda c: math.log(c.speedup) + 0.05 * c.alignment.in_points[0])
        picks["fast"] = max(faster, key=lambda c: c.speedup)
    return picks
