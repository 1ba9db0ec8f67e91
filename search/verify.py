"""Verify: whether what a policy's file claims holds on the device at hand.

Covered: the model fits, what its blocks did, seconds in turn with the unmodified model, and each figure of
`evidence.confirmed` measured again. Not covered: other sampling than the file's own, and a proof of equality: on few
pictures an interval is wide, and a claim that it does not contradict holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat, PositiveFloat

from ..evaluators import Interval, Prompt, get, names, paired_interval, scale_of, speedup, time_runs
from ..policies import BlockPolicy, Report, apply_policy
from .config import ConfigError, Generation, parsed
from .front import beside_steps
from .generation import device_name, embed, generate, some

REPEATS = 3  # timed batches of each


class Claim(BaseModel):
    """A score of the file: the mean difference to the unmodified model, and its interval."""

    delta: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]


class SpeedUpClaim(BaseModel):
    """The one figure of `evidence.confirmed` that is no score, if it is there."""

    speedup: PositiveFloat | None = None


class Evidence(BaseModel):
    """What `confirm` wrote, as far as it can be checked; empty for a policy that nobody confirmed."""

    confirmed: dict[str, Any] = {}
    device: str | None = None

    @classmethod
    def of(cls, policy: BlockPolicy) -> "Evidence":
        return parsed(cls, policy.evidence or {}, "evidence")

    @property
    def speedup(self) -> float | None:
        return parsed(SpeedUpClaim, self.confirmed, "evidence.confirmed").speedup

    @property
    def scores(self) -> dict[str, Claim]:
        """The claims by the name of their evaluator."""
        found = {name: value for name, value in self.confirmed.items() if isinstance(value, dict)}
        return {name: parsed(Claim, value, f"evidence.confirmed.{name}") for name, value in found.items()}


@dataclass(frozen=True)
class SpeedUp:
    """Measured against claimed; faster than claimed is no fault."""

    claimed: float
    measured: float
    tolerance: float
    name: str = "speed-up"

    @property
    def holds(self) -> bool:
        return self.measured >= self.claimed * (1 - self.tolerance)

    def __str__(self) -> str:
        return f"{self.measured:.2f}x here, {self.claimed:.2f}x in the file, tolerance {100 * self.tolerance:.0f} %"


@dataclass(frozen=True)
class Score:
    """A difference to the unmodified model, measured against claimed; better than claimed is no fault."""

    name: str
    claimed: Claim
    measured: Interval
    direction: Literal["maximize", "minimize"]

    @property
    def holds(self) -> bool:
        """Whether the intervals overlap, or the measured one lies on the better side."""
        low, high = self.claimed.ci95
        return self.measured.high >= low if self.direction == "maximize" else self.measured.low <= high

    def __str__(self) -> str:
        low, high = self.claimed.ci95
        here = f"{self.measured.delta:+.4f} [{self.measured.low:+.4f}, {self.measured.high:+.4f}]"
        return f"{here} here, {self.claimed.delta:+.4f} [{low:+.4f}, {high:+.4f}] in the file, n = {self.measured.n}"


@dataclass(frozen=True)
class Verification:
    """What was measured of one policy, and what of its file holds."""

    policy: str
    device: str
    claimed_device: str | None
    steps: int
    unmodified_steps: int
    batch: int
    images: int
    seconds: float  # per batch
    unmodified_seconds: float
    report: Report  # of the last batch
    figures: tuple[SpeedUp | Score, ...]
    unchecked: tuple[str, ...]  # evaluators of the file that were not run
    guidance_scale: float | None = None  # None is the unmodified model's

    @property
    def holds(self) -> bool | None:
        """None where nothing of the file was checked."""
        return all(figure.holds for figure in self.figures) if self.figures else None

    @property
    def lines(self) -> list[str]:
        """For a person: what was measured, a line per figure, and the verdict last."""
        report = self.report
        counts = f"{report.computed} computed, {report.skipped} skipped, {report.reused} reused, {report.scaled} scaled"
        lines = [
            f"{'block calls':<16} {counts} in a batch of {self.steps} steps{beside_steps(self.guidance_scale)}",
            f"{'seconds':<16} {self.seconds:.3f} per batch of {self.batch}, unmodified {self.unmodified_seconds:.3f} "
            f"at {self.unmodified_steps} steps",
        ]
        if self.claimed_device not in (None, self.device):
            lines.append(f"{'device':<16} {self.device} here, {self.claimed_device} in the file")
        for figure in self.figures:
            lines.append(f"{figure.name:<16} {'holds' if figure.holds else 'DOES NOT HOLD'}: {figure}")
        for name in self.unchecked:
            lines.append(f"{name:<16} not checked: no built-in evaluator; to run it, name it in --evaluators")
        failed = [figure.name for figure in self.figures if not figure.holds]
        here = f"on {self.device}, {self.images} pictures"
        if self.holds is None:
            lines.append(f"{self.policy} fits and runs {here}; no figure of its file was checked")
        elif failed:
            lines.append(f"{self.policy} does not hold {here}: {', '.join(failed)}")
        else:
            lines.append(f"{self.policy} holds {here}: {', '.join(figure.name for figure in self.figures)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        counts = {kind: getattr(self.report, kind) for kind in ("computed", "skipped", "reused", "scaled")}
        figures = [
            {
                "name": figure.name,
                "holds": figure.holds,
                "claimed": figure.claimed.model_dump() if isinstance(figure, Score) else figure.claimed,
                "measured": asdict(figure.measured) if isinstance(figure, Score) else figure.measured,
            }
            for figure in self.figures
        ]
        kept = ("policy", "device", "claimed_device", "steps", "guidance_scale", "unmodified_steps", "batch", "images")
        seconds = {"seconds": self.seconds, "unmodified_seconds": self.unmodified_seconds}
        told = {"block_calls": counts, "figures": figures, "unchecked": list(self.unchecked), "holds": self.holds}
        return {key: getattr(self, key) for key in kept} | seconds | told


def verify(
    policy: BlockPolicy,
    pipe: Any,
    prompts: Sequence[Prompt],
    under: Generation,
    unmodified: Generation,
    evaluators: Sequence[str] | None,
    tolerance: float,
    say: Callable[[str], None],
) -> Verification:
    """Measures `policy` with its sampling `under` it beside the unmodified model, and compares with its evidence.

    `evaluators` are scored among those that the evidence names; without them the built-in ones: a file is data, and
    does not get to name code to run. Raises PolicyError for another model, ConfigError for evidence that cannot be read
    or has no such evaluator, BrokenPicture for pixels that are not finite.
    """
    evidence = Evidence.of(policy)
    claimed, claims = evidence.speedup, evidence.scores
    chosen = [name for name in claims if name in names()] if evaluators is None else list(evaluators)
    for name in chosen:
        if name not in claims:
            raise ConfigError(f"--evaluators has {name!r}; evidence.confirmed has {', '.join(claims) or 'none'}.")
    scorers = {name: get(name) for name in chosen}
    batch = unmodified.batch

    texts = [prompt.text for prompt in prompts]
    embeddings = embed(pipe, texts, under)
    with apply_policy(pipe, policy) as applied:
        say(f"generating {len(prompts)} pictures under {policy.name}")
        after = generate(pipe, prompts, embeddings, under)
    say(f"generating {len(prompts)} pictures with the unmodified model")
    before = generate(pipe, prompts, embeddings, unmodified)
    say("timing both in turn")
    few, rows = prompts[:batch], some(embeddings, slice(batch))
    turns = [
        (
            time_runs(lambda: generate(pipe, few, rows, unmodified), repeats=1, warmup=0),
            time_runs(lambda: generate(pipe, few, rows, under, policy), repeats=1, warmup=0),
        )
        for _ in range(REPEATS)
    ]
    before_each, after_each = zip(*turns, strict=True)
    unmodified_seconds, seconds = median(before_each), median(after_each)

    figures: list[SpeedUp | Score] = []
    if claimed is not None:
        figures.append(SpeedUp(claimed, speedup(before_each, after_each), tolerance))
    for name, scorer in scorers.items():
        scores = (scorer.score(images, texts, before) for images in (after, before))
        figures.append(
            Score(name, claims[name], paired_interval(*scores, groups=texts, scale=scale_of(scorer)), scorer.direction)
        )
    return Verification(
        policy=policy.name,
        device=device_name(pipe.device),
        claimed_device=evidence.device,
        steps=under.num_inference_steps,
        unmodified_steps=unmodified.num_inference_steps,
        batch=len(few),
        images=len(prompts),
        seconds=seconds,
        unmodified_seconds=unmodified_seconds,
        report=applied.report,
        figures=tuple(figures),
        unchecked=tuple(name for name in claims if name not in chosen),
        guidance_scale=under.guidance_scale if under.guidance_scale != unmodified.guidance_scale else None,
    )
