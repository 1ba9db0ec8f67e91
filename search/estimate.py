"""What a search would take and what it could tell, before it is started.

Covered: pictures, device hours by a cost table, the size of the space, and the smallest difference that confirm can
detect. Not covered: loading, scoring and idle workers, which are no share of a cost table.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluators import CostTable, get, minimum_detectable_difference, scale_of
from .config import Config, ConfigError, parsed
from .generation import read_identity
from .prompts import fewer_than_asked, read_prompts
from .run_directory import RunDirectory
from .scoring import judge_of
from .space import anchors, distributions, guidance_ends_of, steps_of

# of one batch: an untimed one and three repeats; one more for each operand inside the attention, and for guidance's end
TABLE_RUNS = 4
# Standard deviation of a policy's differences, as a share of the evaluator's scale. Of the policies confirmed on the
# bundled model those that held lie between 0.06 and 0.2, those that change many pictures at 0.3 to 0.5.
TYPICAL_SPREAD = 0.15
# Blocks of the examples' models, which need not lie on the machine of a dry run.
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": 57,
    "Qwen/Qwen-Image": 60,
    "stabilityai/stable-diffusion-3.5-large": 38,
    "stabilityai/stable-diffusion-3.5-medium": 24,
}


@dataclass(frozen=True)
class Detectable:
    """The smallest true difference of one objective, in points, that confirm finds four times out of five.

    It is also the smallest margin within which a policy that loses nothing holds as often.
    """

    evaluator: str
    points: float
    pictures: int
    margin: float  # of the config, in points
    basis: str  # where the spread is from

    def __str__(self) -> str:
        told = f"{self.evaluator} from {self.points:.1f} points on, with {self.pictures} pictures, {self.basis}"
        if self.points <= self.margin:
            return told
        wanted = int(np.ceil(self.pictures * (self.points / self.margin) ** 2))
        return f"{told}; what loses nothing holds within {self.margin:g} points with about {wanted}"


@dataclass(frozen=True)
class Cost:
    """What is to be drawn, and for how long. Counts and hours are upper ends."""

    pictures: dict[str, int]  # by stage
    seconds: float | None  # of one device; None where they are not known
    basis: str  # what the seconds are of, or why they are not known

    @property
    def lines(self) -> list[str]:
        """For a person."""
        stages = ", ".join(f"{name} {count}" for name, count in self.pictures.items())
        hours = "" if self.seconds is None else f"at most {self.seconds / 3600:.2f} hours of "
        return [
            f"{'pictures':<12} at most {sum(self.pictures.values())}: {stages}",
            f"{'time':<12} {hours}{self.basis}",
        ]


@dataclass(frozen=True)
class Estimate(Cost):
    """A search that has not run: policies save time, and equal ones run once."""

    dimensions: int
    detectable: tuple[Detectable, ...]
    fewer: tuple[str, ...]  # prompts than asked for

    @property
    def lines(self) -> list[str]:
        """For a person."""
        pictures, time = super().lines
        fewer = (f"{'prompts':<12} {one}" for one in self.fewer)
        space = f"{'space':<12} {self.dimensions} dimensions"
        return [pictures, *fewer, time, space, *(f"{'detectable':<12} {one}" for one in self.detectable)]


def read_cost_table(path: Path) -> CostTable:
    """`cost_table.json` of a run. ConfigError for a file that holds none."""
    try:
        return parsed(CostTable, json.loads(path.read_text("utf-8")), str(path))
    except (OSError, json.JSONDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--cost-table is {str(path)!r}, which cannot be read: {cause}.") from None


def check_model(table: CostTable, config: Config) -> None:
    """ConfigError for a table of a model with other blocks than the config's, where it is known how many that has.

    Known is what lies on this machine, for nothing is downloaded.
    """
    has, wanted = len(table.block_compute), _blocks(config.model.path)
    if wanted not in (None, has):
        raise ConfigError(f"the cost table is of {has} blocks; accepted: {wanted}, as {config.model.path} has.")


def _blocks(path: str) -> int | None:
    try:
        return read_identity(path, download=False).num_blocks
    except ConfigError:
        return PUBLISHED.get(path)


def known_cost_table(run: RunDirectory) -> CostTable | None:
    """The one that a search has measured in `run`."""
    stored = run.path / "cost_table.json"
    return read_cost_table(stored) if stored.exists() else None


def estimate(config: Config, run: RunDirectory, table: CostTable | None = None) -> Estimate:
    """For the search of `config` into `run`, by `table` or the one that lies there. Nothing is written.

    Raises ConfigError for a table of other pictures than the config's.
    """
    table = table or known_cost_table(run)
    counts = {split: len(read_prompts(config, split)) for split in ("search", "confirm")}
    batch = min(config.generation.batch, counts["search"])
    blocks = len(table.block_compute) if table else config.space.bands
    compared = _compared(config, blocks)
    more = sum(operand != "input" for operand in config.space.operands) + bool(guidance_ends_of(config))
    pictures = {
        "cost table": (TABLE_RUNS + more) * batch,
        "baseline": counts["search"],
        "search": config.search.trials * counts["search"],
        "confirm": (1 + compared) * counts["confirm"],
        "timing": (3 + compared) * config.confirm.repeats * min(config.generation.batch, counts["confirm"]),
    }
    if judge_of(config):
        pictures["best of"] = 3 * counts["confirm"]  # for three picks, in time: what the unmodified model draws in it
    told = cost(config, pictures, table)
    dimensions, fewer = len(distributions(config, blocks)), tuple(fewer_than_asked(config))
    return Estimate(told.pictures, told.seconds, told.basis, dimensions, detectable(config, run, blocks), fewer)


def cost(config: Config, pictures: dict[str, int], table: CostTable | None) -> Cost:
    """Of so many `pictures` of the unmodified model. ConfigError for a table of others than the config's."""
    if table is None:
        return Cost(
            pictures,
            None,
            "not known without a cost table: a search writes cost_table.json in its first minutes and can be stopped "
            "then; or give one of this model, size and batch by --cost-table",
        )
    _check(table, config, min(config.generation.batch, len(read_prompts(config, "search"))))
    calls = max(steps_of(config)) * table.calls_per_step
    each = table.predict([["compute"] * len(table.block_compute)] * calls) / table.batch
    size = f"{table.width}x{table.height} in {table.dtype}, of {len(table.block_compute)} blocks"
    basis = f"one {table.device}, scoring not counted: {each:.3f} s per picture of {size}"
    return Cost(pictures, sum(pictures.values()) * each, basis)


def _check(table: CostTable, config: Config, batch: int) -> None:
    generation = config.generation
    for field, has, wanted in (
        ("height", table.height, generation.height),
        ("width", table.width, generation.width),
        ("batch", table.batch, batch),
    ):
        if wanted is not None and has != wanted:
            raise ConfigError(f"the cost table has {field} {has}; accepted: {wanted}, as the config draws.")


def _compared(config: Config, blocks: int) -> int:
    """How many candidates confirm compares with the unmodified model, which is an anchor itself."""
    return len(anchors(config, blocks)) - 1 + config.confirm.candidates


def detectable(config: Config, run: RunDirectory, blocks: int) -> tuple[Detectable, ...]:
    """What confirm can tell of alignment and quality, when all that it compares share its error of 5 %.

    Pictures count alike whether they are of one prompt or of many; of one prompt they tell a little less.
    """
    pictures = len(read_prompts(config, "confirm"))
    objectives, confirm = config.objectives, config.confirm
    level, found = 1 - 0.05 / _compared(config, blocks), []
    for name, margin in ((objectives.alignment, confirm.margin), (objectives.quality, confirm.quality_margin)):
        spread, basis = _spread(run, name)
        points = 100 * minimum_detectable_difference(pictures, spread, level) / scale_of(get(name))
        found.append(Detectable(name, points, pictures, 100 * margin, basis))
    return tuple(found)


def _spread(run: RunDirectory, name: str) -> tuple[float, str]:
    """Standard deviation of the differences to the unmodified model, in units of the score, and where it is from."""
    assumed = TYPICAL_SPREAD * scale_of(get(name)), f"if differences spread by {100 * TYPICAL_SPREAD:g} points"
    if not (run.scores / "unmodified.parquet").exists():
        return assumed
    before = run.read_scores("unmodified")[name].to_numpy()
    trials = [run.read_scores(path.stem)[name].to_numpy() for path in sorted(run.scores.glob("trial-*.parquet"))]
    differences = [scores - before[: len(scores)] for scores in trials]
    changed = [float(d.std(ddof=1)) for d in differences if np.ptp(d) > 0]
    if changed:
        return float(np.median(changed)), f"as differences spread in the median of {len(changed)} trials"
    if np.ptp(before) == 0:  # no picture differs from another, which tells nothing
        return assumed
    # Scores that have nothing to do with the unmodified model's would differ by the root of two of its own spread.
    return float(before.std(ddof=1)) * 2**0.5, "at worst, for pictures that have nothing of the unmodified model's"
