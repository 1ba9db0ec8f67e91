"""Probe: what each block does, one at a time (arXiv 2601.02211, Sec. 3), as paired differences with intervals.

For every effect, window and block the search prompts are drawn again with that one block changed, and compared picture
by picture with the unmodified model, for all prompts and for each kind; then come the controls.

Coarse to fine: every block on a few pictures, then, as far as the budget goes, more of those blocks of which is least
settled whether they are among the best of their effect.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluators import CostTable, get, paired_interval, scale_of
from ..policies import BlockPolicy
from . import controls
from .allocation import coarse_to_fine
from .candidate import Candidate
from .config import Config, ConfigError
from .config import Probe as ProbeConfig
from .estimate import Cost, check_model, cost, known_cost_table
from .generation import read_identity
from .part import EFFECTS, Case, Part, Parts, Scores, Table
from .pool import Job, Pool
from .progress import Display
from .run_directory import RunDirectory
from .scoring import Measurement
from .space import window_name
from .study import check_objectives

PACE = "seconds_per_picture"  # of one worker, by its device, in run.json


class Probe:
    """A probe in one run directory; what was measured stays there, and is not measured again."""

    def __init__(self, config: Config, run: RunDirectory, pool: Pool, display: Display):
        self.config, self.run, self.pool, self.display = config, run, pool, display
        self.model = pool.description.model
        self.parts = Parts(config, run, self.model)
        self.prompts, self.images = self.parts.prompts, self.parts.images
        self.refused: dict[str, str] = {}  # effects that the model does not know, and why
        self.gains: dict[Case, list[np.ndarray]] = {}  # of each picture, by block
        self.pace: float | None = run.read_state().get(PACE, {}).get(pool.description.device)
        self._allow()

    def cost(self) -> Cost:
        """What is still to be drawn; how long that takes is not known before the first pictures are."""
        left = to_draw(self.parts)
        if self.pace is None:
            return Cost(left, None, "told when the first pictures are drawn")
        seconds = self.pace * sum(left.values())
        minutes = f"{seconds / self.pool.size / 60:.1f} minutes with all {self.pool.size}"
        return Cost(left, seconds, f"one worker, {minutes}: {self.pace:.3f} s per picture as measured, with scoring")

    def measure(self) -> Table:
        """All blocks under all effects: block, effect, window, kind, delta, low, high, n, similarities; written, too.

        Differences of alignment and their ends are in shares of what counts as 100 points, `n` are the pictures that a
        block had, similarities the means of what compares them with the unmodified model's. ConfigError where the model
        refuses all.
        """
        probe, blocks = self.config.probe, self.model.num_blocks
        for line in self.cost().lines:
            self.display.say(line)
        self._baseline("search")
        self.display.stage("blocks", math.ceil(pictures(probe, blocks, self.images) / probe.first_images))

        def draw(wanted: Mapping[tuple[Case, int], int]) -> dict[tuple[Case, int], np.ndarray]:
            parts = {
                Part(case[0], (block,), case[1], images): (case, block) for (case, block), images in wanted.items()
            }
            measured = self._run([part for part in parts if part.effect not in self.refused])
            known = {p: scores for p, scores in measured.items() if p.effect not in self.refused}
            return {parts[part]: self.parts.gains(part, scores, self._before) for part, scores in known.items()}

        gains = coarse_to_fine(
            draw, self.parts.cases, blocks, self.images, probe.first_images, probe.share, probe.chosen
        )
        self.gains = {case: known for case, known in gains.items() if case[0] not in self.refused}
        if not self.gains:
            reasons = "; ".join(f"{effect}: {reason}" for effect, reason in self.refused.items())
            raise ConfigError(f"probe.effects has nothing that this model does: {reasons}")
        parts = [Part(c[0], (b,), c[1], len(of)) for c, known in self.gains.items() for b, of in enumerate(known)]
        table = self._table(parts)
        self._write(table, "probe.parquet")
        return table

    def controls(self) -> Table:
        """What controls gave after `measure`: set, effect, window, blocks, steps, and as the table of all blocks."""
        self._baseline("confirm")
        sets = controls.sets(self.config, self.model, self.gains, self.images)
        parts = list(dict.fromkeys(part for _, part in sets))
        self.display.stage("controls", len(parts))
        measured, rows = self._run(parts), []
        for name, part in sets:
            if part in measured:
                steps = part.steps or self.config.generation.num_inference_steps
                told = {"effect": part.effect, "window": window_name(part.window), "blocks": list(part.blocks)}
                rows.append({"set": name, **told, "steps": steps, **self._deltas(part, "all")})
        result: Table = pd.DataFrame(rows, columns=None if rows else ["set", "effect", "window"])
        self._write(result, "probe_sets.parquet")
        return result

    def _measured(self, result: Measurement) -> None:
        """The first pictures tell how long all take, and for how long a worker may be silent."""
        if self.pace is not None:
            return
        self.pace = (result.generate_seconds + result.score_seconds) / len(result.images)
        state = self.run.read_state()
        paces = {**state.get(PACE, {}), self.pool.description.device: self.pace}
        self.run.write_json(self.run.state, {**state, PACE: paces})
        self._allow()
        self.display.say(self.cost().lines[-1])

    def _allow(self) -> None:
        """As in a search; the largest job is the unmodified model on a whole split."""
        if self.pace is not None:
            self.pool.expect(max(map(len, self.prompts.values())), self.pace)

    def _baseline(self, split: str) -> None:
        name = self.parts.unmodified(split)
        if self.parts.before(split) is None:
            plain = BlockPolicy(name="unmodified", model=self.model, rules=())
            steps = self.config.generation.num_inference_steps
            (job,) = self.pool.run([Job("measure", (Candidate(plain, steps), split, None))])
            self.run.write_images(name, job.result.images)
            self.run.write_scores(name, self.prompts[split], job.result.scores)
            self._measured(job.result)
        self._reference = self.pool.put(self.run.read_images(name))
        self._before: Table = self.parts.before(split)

    def _run(self, parts: list[Part]) -> dict[Part, Scores]:
        """Measure what is missing; scores of all that did not fail. An effect that fails is refused from now on."""
        steps = self.config.generation.num_inference_steps

        def keep(job: Job) -> None:
            (part, known), scores = job.tag, job.result.scores
            if known is not None:
                scores = {name: np.concatenate([known[name], values]) for name, values in scores.items()}
            self.run.write_scores(self.parts.name(part), self.prompts[part.split][: part.images], scores)
            measured[part] = scores
            self._measured(job.result)
            self.display.advance(str(part))

        jobs, measured = [], dict[Part, Scores]()
        for part in parts:
            known = self.parts.scores(part)
            drawn = 0 if known is None else len(known)
            if drawn < part.images:
                one = Candidate(part.policy(self.model, self.config.probe.scale), part.steps or steps)
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

    def _deltas(self, part: Part, kind: str) -> dict[str, Any]:
        known: Table = self.parts.scores(part)
        after, before = known.iloc[: part.images], self._before.iloc[: part.images]
        rows = np.ones(len(after), bool) if kind == "all" else (after["kind"] == kind).to_numpy()
        name = self.config.objectives.alignment
        scale = scale_of(get(name))
        prompts = list(before["prompt"][rows])
        alike = {of: float(after[of][rows].mean()) for of in self.parts.similarities}
        if len(set(prompts)) < 2:  # one prompt has no spread, and so no interval
            delta = float((after[name] - before[name])[rows].mean()) / scale
            return {"delta": delta, "low": math.nan, "high": math.nan, "n": len(prompts), **alike}
        told = paired_interval(after[name][rows] / scale, before[name][rows] / scale, groups=prompts)
        return {"delta": told.delta, "low": told.low, "high": told.high, "n": told.n, **alike}

    def _table(self, parts: list[Part]) -> Table:
        prompts = self.prompts["search"]
        rows = [
            {"block": p.blocks[0], "effect": p.effect, "window": window_name(p.window), "kind": kind}
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


def to_draw(parts: Parts) -> dict[str, int]:
    """By stage the pictures that a probe has still to draw, at most: its schedule is followed as far as it is known."""
    probe, blocks, images = parts.config.probe, parts.model.num_blocks, parts.images
    left = {"baseline": sum(len(of) for split, of in parts.prompts.items() if parts.before(split) is None)}
    before, asked = parts.before("search"), dict[tuple[Case, int], int]()

    @cache  # the schedule asks for a block again and again
    def known(case: Case, block: int) -> np.ndarray:
        part = Part(case[0], (block,), case[1], images)
        scores = parts.scores(part)
        return np.empty(0) if before is None or scores is None else parts.gains(part, scores, before)

    def follow(wanted: Mapping[tuple[Case, int], int]) -> dict[tuple[Case, int], np.ndarray]:
        asked.update(wanted)
        if any(len(known(*one)) < count for one, count in wanted.items()):
            raise LookupError
        return {one: known(*one)[:count] for one, count in wanted.items()}

    try:
        gains = coarse_to_fine(follow, parts.cases, blocks, images, probe.first_images, probe.share, probe.chosen)
    except LookupError:
        drawn = sum(min(len(known(*one)), count) for one, count in asked.items())
        left |= {"blocks": pictures(probe, blocks, images) - drawn, "controls": controls.count(probe, images)}
    else:
        sets = {part for _, part in controls.sets(parts.config, parts.model, gains, images)}
        scores = [parts.scores(part) for part in sets]
        drawn = sum(0 if one is None else min(len(one), images) for one in scores)
        left |= {"blocks": 0, "controls": len(sets) * images - drawn}
    return left


def estimate_probe(config: Config, run: RunDirectory, table: CostTable | None = None) -> Cost:
    """What a probe into `run` would draw, and for how long by `table` or the one that lies there. Nothing is written.

    Raises ConfigError for a table of another model or of other pictures than the config's, and for another run.
    """
    check_objectives(config)
    if run.config.exists():
        run.check_same(config)
    table, model = table or known_cost_table(run), read_identity(config.model.path)
    if table:
        check_model(table, config)
    return cost(config, to_draw(Parts(config, run, model)), table)


def best_blocks(table: Table, effect: str, count: int) -> list[int]:
    """The `count` blocks that an effect marks as the best in a table of one window, best first."""
    rows = table[(table["effect"] == effect) & (table["kind"] == "all")].set_index("block")
    return [int(b) for b in (rows["delta"] * EFFECTS[effect][1]).nlargest(count).index]


def launch_probe(config: Config, path: Path) -> RunDirectory:
    """Probe into the run directory `path`, new or of the same model, prompts and objectives; and return it.

    Raises as `launch` does.
    """
    check_objectives(config)
    run = RunDirectory.open(path, config, resume=(path / "config.yaml").exists())
    # pixels are compared whatever is reported; the run's own config stays as it was given
    reported = tuple(dict.fromkeys((*config.objectives.reported, "psnr")))
    config = config.model_copy(update={"objectives": config.objectives.model_copy(update={"reported": reported})})
    with Display() as display:
        display.wait("starting workers")
        pool = Pool(config, run.read_state().get("dtype"))
        try:
            on = {key: getattr(pool.description, key) for key in ("dtype", "device", "versions")}
            run.write_json(run.state, on | run.read_state())
            display.say(f"{pool.size} on {pool.description.device}, {pool.description.dtype}")
            probe = Probe(config, run, pool, display)
            probe.measure()
            probe.controls()
        finally:
            pool.close()
            run.release()
    return run
