"""Probe: what each block does, one at a time (arXiv 2601.02211, Sec. 3), as paired differences with intervals.

For every effect, window and block the search prompts are drawn again with that one block changed, and compared picture
by picture with the unmodified model, for all prompts and for each kind. Controls: text made louder in front of the last
block, which must change nothing; and on held-out prompts the best blocks together against random sets of their size and
against all blocks at the same budget.

Coarse to fine: every block on a few pictures, then, as far as the budget goes, more of those blocks of which is least
settled whether they are among the best of their effect.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..evaluators import get, paired_interval, scale_of
from ..policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from ..policies.policy import ModelIdentity
from .allocation import coarse_to_fine
from .candidate import Candidate
from .config import Config, ConfigError
from .config import Probe as ProbeConfig
from .pool import Job, Pool
from .progress import Display
from .prompts import read_prompts
from .run_directory import RunDirectory
from .study import check_objectives

Action: TypeAlias = Skip | Reuse | ScaleText
Table: TypeAlias = Any  # a pandas DataFrame, whose annotations answer for every kind of index at once
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
Case: TypeAlias = tuple[str, tuple[float, float]]  # an effect in a window
Scores: TypeAlias = Any  # by evaluator, of each picture: a table, or a dictionary of arrays


@dataclass(frozen=True)
class Part:
    """One change to measure: an effect at some blocks in a window, on the first `images` prompts of a split."""

    effect: str
    blocks: tuple[int, ...]
    window: tuple[float, float]
    images: int
    split: str = "search"
    scale: float | None = None  # the config's when not given

    def __str__(self) -> str:
        return f"{self.effect} {list(self.blocks)}"

    def policy(self, model: ModelIdentity, scale: float) -> BlockPolicy:
        action = EFFECTS[self.effect][0](self.scale or scale)
        rule = Rule(blocks=self.blocks, window=self.window, action=action)
        return BlockPolicy(name=str(self), model=model, rules=(rule,))

    def file(self, model: ModelIdentity, scale: float) -> str:
        """What its scores are called in the run directory, however many pictures they are of."""
        digest = hashlib.sha256(f"{self.policy(model, scale).digest}-{self.split}".encode()).hexdigest()
        return f"probe-{digest[:16]}"


class Probe:
    """A probe in one run directory; what was measured stays there, and is not measured again."""

    def __init__(self, config: Config, run: RunDirectory, pool: Pool, display: Display):
        self.config, self.run, self.pool, self.display = config, run, pool, display
        self.model = pool.description.model
        self.prompts = {split: read_prompts(config, split) for split in ("search", "confirm")}
        self.images = min(config.probe.images, *map(len, self.prompts.values()))
        self.seconds_per_image = 0.0
        self.refused: dict[str, str] = {}  # effects that the model does not know, and why

    def measure(self) -> Table:
        """All blocks under all effects: block, effect, window, kind, delta, low, high, n, psnr; written as well.

        Differences of alignment and their ends are in shares of what counts as 100 points, `n` are the pictures that a
        block had. ConfigError where the model refuses all.
        """
        probe, blocks = self.config.probe, self.model.num_blocks
        self._baseline("search")
        self._tell_cost()
        self.display.stage("blocks", math.ceil(pictures(probe, blocks, self.images) / probe.first_images))

        def draw(wanted: Mapping[tuple[Case, int], int]) -> dict[tuple[Case, int], np.ndarray]:
            parts = {
                Part(case[0], (block,), case[1], images): (case, block) for (case, block), images in wanted.items()
            }
            measured = self._run([part for part in parts if part.effect not in self.refused])
            known = {p: scores for p, scores in measured.items() if p.effect not in self.refused}
            return {parts[part]: self._gains(part, scores) for part, scores in known.items()}

        cases = [(effect, window) for window in probe.windows for effect in probe.effects]
        gains = coarse_to_fine(draw, cases, blocks, self.images, probe.first_images, probe.share, probe.chosen)
        gains = {case: known for case, known in gains.items() if case[0] not in self.refused}
        if not gains:
            reasons = "; ".join(f"{effect}: {reason}" for effect, reason in self.refused.items())
            raise ConfigError(f"probe.effects has nothing that this model does: {reasons}")
        table = self._table(
            [Part(c[0], (b,), c[1], len(of)) for c, known in gains.items() for b, of in enumerate(known)]
        )
        self._write(table, "probe.parquet")
        return table

    def controls(self, table: Table) -> Table:
        """The best blocks of the most helpful louder text together, random sets, and all: on held-out prompts.

        `all` has every block at the scale whose product over the blocks is that of the chosen ones.
        """
        probe = self.config.probe
        louder = table[(table["kind"] == "all") & table["effect"].str.startswith("enhance")]
        louder = louder[louder["effect"] != "enhance input"]  # acts on later blocks, too
        if louder.empty:
            return pd.DataFrame()
        self._baseline("confirm")
        best = louder.nlargest(probe.chosen, "delta")
        effect, told = best.groupby(["effect", "window"])["delta"].sum().idxmax()
        ranked = louder[(louder["effect"] == effect) & (louder["window"] == told)].nlargest(probe.chosen, "delta")
        window, chosen = _window(told), tuple(sorted(int(b) for b in ranked["block"]))
        rng = np.random.default_rng(self.config.search.seed)
        blocks = self.model.num_blocks
        sets = {"chosen": Part(effect, chosen, window, self.images, "confirm")}
        for i in range(probe.random_sets):
            drawn = tuple(sorted(int(b) for b in rng.choice(blocks, len(chosen), replace=False)))
            sets[f"random {i + 1}"] = Part(effect, drawn, window, self.images, "confirm")
        shared = probe.scale ** (len(chosen) / blocks)
        sets["all"] = Part(effect, tuple(range(blocks)), window, self.images, "confirm", shared)
        if "enhance input" in probe.effects and "enhance input" not in self.refused:
            # twice as loud: 1.5 times rounds in bfloat16, which alone changed a picture and its score
            sets["last block, no-op"] = Part("enhance input", (blocks - 1,), (0.0, 1.0), self.images, "confirm", 2.0)
        parts = list(dict.fromkeys(sets.values()))
        self.display.stage("controls", len(parts))
        self._run(parts)
        rows = []
        for name, part in sets.items():
            told = self._deltas(part, "all")
            rows.append({"set": name, "effect": part.effect, "blocks": list(part.blocks), **told})
        result: Table = pd.DataFrame(rows)
        self._write(result, "probe_sets.parquet")
        return result

    def _tell_cost(self) -> None:
        probe, blocks = self.config.probe, self.model.num_blocks
        planned = pictures(probe, blocks, self.images)
        full = pictures(probe.model_copy(update={"first_images": self.images}), blocks, self.images)
        minutes = planned * self.seconds_per_image / self.pool.size / 60
        share = f", {100 * planned / full:.0f} % of every block on all pictures" if planned < full else ""
        self.display.say(f"probing draws {planned} pictures{share}: about {minutes:.0f} minutes")

    def _baseline(self, split: str) -> None:
        name = "unmodified" if split == "search" else "confirm-unmodified"
        if not (self.run.scores / f"{name}.parquet").exists():
            plain = BlockPolicy(name="unmodified", model=self.model, rules=())
            steps = self.config.generation.num_inference_steps
            (job,) = self.pool.run([Job("measure", (Candidate(plain, steps), split, None))])
            self.run.write_images(name, job.result.images)
            self.run.write_scores(name, self.prompts[split], job.result.scores)
            self.seconds_per_image = job.result.generate_seconds / len(job.result.images)
        self._reference = self.pool.put(self.run.read_images(name))
        self._before = self.run.read_scores(name)

    def _name(self, part: Part) -> str:
        return part.file(self.model, self.config.probe.scale)

    def _run(self, parts: list[Part]) -> dict[Part, Scores]:
        """Measure what is missing; scores of all that did not fail. An effect that fails is refused from now on."""
        steps = self.config.generation.num_inference_steps

        def keep(job: Job) -> None:
            (part, known), scores = job.tag, job.result.scores
            if known is not None:
                scores = {name: np.concatenate([known[name], values]) for name, values in scores.items()}
            self.run.write_scores(self._name(part), self.prompts[part.split][: part.images], scores)
            measured[part] = scores
            self.display.advance(str(part))

        jobs, measured = [], dict[Part, Scores]()
        for part in parts:
            known = self._scores(part)
            drawn = 0 if known is None else len(known)
            if drawn < part.images:
                one = Candidate(part.policy(self.model, self.config.probe.scale), steps)
                jobs.append(Job("measure", (one, part.split, self._reference, part.images, drawn), (part, known)))
            else:
                measured[part] = known
                self.display.advance(str(part))
        failed = self.pool.try_all(jobs, keep)
        for job in failed:
            part, _ = job.tag
            if part.effect not in self.refused:
                self.refused[part.effect] = str(job.error)
                self.display.say(f"{part.effect} is left out: {job.error}")
        return measured

    def _gains(self, part: Part, scores: Scores) -> np.ndarray:
        """How far each picture so far was helped, or needs the text, of shape (pictures,)."""
        after, before = (
            np.asarray(of[self.config.objectives.alignment])[: part.images] for of in (scores, self._before)
        )
        return EFFECTS[part.effect][1] * (after - before)

    def _scores(self, part: Part) -> Table | None:
        """Those of a change that are known, of the first so many prompts; None where none are."""
        name = self._name(part)
        return self.run.read_scores(name) if (self.run.scores / f"{name}.parquet").exists() else None

    def _deltas(self, part: Part, kind: str) -> dict[str, Any]:
        after: Table = self.run.read_scores(self._name(part)).iloc[: part.images]
        before = self._before.iloc[: len(after)]
        rows = np.ones(len(after), bool) if kind == "all" else (after["kind"] == kind).to_numpy()
        name = self.config.objectives.alignment
        scale = scale_of(get(name))
        prompts = list(before["prompt"][rows])
        if len(set(prompts)) < 2:  # one prompt has no spread, and so no interval
            delta = float((after[name] - before[name])[rows].mean()) / scale
            return {"delta": delta, "low": math.nan, "high": math.nan, "n": len(prompts), "psnr": math.nan}
        told = paired_interval(after[name][rows] / scale, before[name][rows] / scale, groups=prompts)
        psnr = float(after["psnr"][rows].mean()) if "psnr" in after else math.nan
        return {"delta": told.delta, "low": told.low, "high": told.high, "n": told.n, "psnr": psnr}

    def _table(self, parts: list[Part]) -> Table:
        prompts = self.prompts["search"]
        rows = [
            {"block": p.blocks[0], "effect": p.effect, "window": f"{p.window[0]:g}-{p.window[1]:g}", "kind": kind}
            | self._deltas(p, kind)
            for p in parts
            for kind in ["all", *dict.fromkeys(prompt.kind for prompt in prompts[: p.images])]
        ]
        return pd.DataFrame(rows)

    def _write(self, table: Table, name: str) -> None:
        beside = self.run.path / f"{name}.new"
        table.to_parquet(beside, index=False)
        beside.replace(self.run.path / name)


def pictures(probe: ProbeConfig, num_blocks: int, images: int) -> int:
    """How many are drawn at most of blocks under all effects, where `images` are all of a block."""
    cases = num_blocks * len(probe.effects) * len(probe.windows)
    return max(cases * min(probe.first_images, images), int(probe.share * cases * images))


def _window(told: str) -> tuple[float, float]:
    start, end = told.split("-")
    return float(start), float(end)


def best_blocks(table: Table, effect: str, count: int) -> list[int]:
    """The `count` blocks that an effect marks as the best, over all windows, best first."""
    rows = table[(table["effect"] == effect) & (table["kind"] == "all")]
    means = rows.groupby("block")["delta"].mean() * EFFECTS[effect][1]
    return [int(b) for b in means.nlargest(count).index]


def launch_probe(config: Config, path: Path) -> RunDirectory:
    """Probe into the run directory `path`, new or of the same model, prompts and objectives; and return it.

    Raises as `launch` does.
    """
    check_objectives(config)
    run = RunDirectory.open(path, config, resume=(path / "config.yaml").exists())
    with Display() as display:
        display.wait("starting workers")
        pool = Pool(config, run.read_state().get("dtype"))
        try:
            on = {key: getattr(pool.description, key) for key in ("dtype", "device", "versions")}
            run.write_json(run.state, on | run.read_state())
            display.say(f"{pool.size} on {pool.description.device}, {pool.description.dtype}")
            probe = Probe(config, run, pool, display)
            probe.controls(probe.measure())
        finally:
            pool.close()
            run.release()
    return run
