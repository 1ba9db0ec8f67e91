"""Probe: what each block does, one at a time (arXiv 2601.02211, Sec. 3), as paired differences with intervals.

For every effect, window and block the search prompts are drawn again with that one block changed, and compared picture
by picture with the unmodified model, for all prompts and for each kind. Controls: text made louder in front of the last
block, which must change nothing; and on held-out prompts the best blocks together against random sets of their size and
against all blocks at the same budget.

Coarse to fine: groups of neighbouring blocks first, then the blocks of the groups that matter most, both on a quarter
of the pictures; then the best of these blocks on all.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..evaluators import get, paired_interval, scale_of
from ..policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from ..policies.policy import ModelIdentity
from .candidate import Candidate
from .config import Config
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
FEW = 4  # one in so many pictures is drawn for what only has to be ranked
KEPT = 3  # one in so many groups goes on
Blocks: TypeAlias = tuple[int, ...]
Case: TypeAlias = tuple[str, tuple[float, float]]  # an effect in a window


@dataclass(frozen=True)
class Part:
    """One change to measure: an effect at some blocks in a window, on the first `images` prompts of a split."""

    effect: str
    blocks: Blocks
    window: tuple[float, float]
    images: int
    split: str = "search"
    scale: float | None = None  # the config's when not given

    def policy(self, model: ModelIdentity, scale: float) -> BlockPolicy:
        action = EFFECTS[self.effect][0](self.scale or scale)
        rule = Rule(blocks=self.blocks, window=self.window, action=action)
        return BlockPolicy(name=f"{self.effect} {list(self.blocks)}", model=model, rules=(rule,))


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
        """All blocks under all effects: block, effect, window, kind, delta, low, high, n, psnr, whole; written as well.

        `whole` tells blocks that had all pictures from those that fell out on a part of them. Differences of
        alignment and their ends are in shares of what counts as 100 points.
        """
        probe, blocks = self.config.probe, self.model.num_blocks
        self._baseline("search")
        cases: list[Case] = [(effect, window) for window in probe.windows for effect in probe.effects]
        singles: list[Blocks] = [(b,) for b in range(blocks)]
        last = dict.fromkeys(cases, singles)
        tried: list[Part] = []
        self._tell_cost()
        if probe.group > 1:
            groups = [tuple(range(a, min(a + probe.group, blocks))) for a in range(0, blocks, probe.group)]
            few = _few(self.images)
            best = self._best("groups of blocks", dict.fromkeys(cases, groups), few, math.ceil(len(groups) / KEPT))
            inside = {case: [(b,) for group in chosen for b in group] for case, chosen in best.items()}
            last = self._best("their blocks", inside, few, probe.chosen)
            tried = _parts(inside, few)
        parts = _parts(last, self.images)
        self._run("the best blocks" if tried else "blocks", parts)
        reached = {(p.effect, p.window, p.blocks) for p in parts}
        parts += [p for p in tried if (p.effect, p.window, p.blocks) not in reached]
        table = self._table([p for p in parts if p.effect not in self.refused])
        self._write(table, "probe.parquet")
        return table

    def _best(self, stage: str, cases: dict[Case, list[Blocks]], images: int, count: int) -> dict[Case, list[Blocks]]:
        """The `count` best of each case on its first `images` pictures, in their order; without what is refused."""
        means = self._run(stage, _parts(cases, images))
        best: dict[Case, list[Blocks]] = {}
        for case, blocks in cases.items():
            effect, window = case
            if effect not in self.refused:
                gains = {b: EFFECTS[effect][1] * means[Part(effect, b, window, images)] for b in blocks}
                best[case] = sorted(blocks, key=gains.__getitem__, reverse=True)[:count]
        return best

    def controls(self, table: Table) -> Table:
        """The best blocks of the most helpful louder text together, random sets, and all: on held-out prompts.

        `all` has every block at the scale whose product over the blocks is that of the chosen ones.
        """
        probe = self.config.probe
        louder = table[(table["kind"] == "all") & table["effect"].str.startswith("enhance")]
        louder = louder[louder["whole"] & (louder["effect"] != "enhance input")]  # acts on later blocks, too
        if louder.empty:
            return pd.DataFrame()
        self._baseline("confirm")
        best = louder.nlargest(probe.chosen, "delta")
        effect = str(best.groupby("effect")["delta"].sum().idxmax())
        window = _window(str(louder[louder["effect"] == effect]["window"].iloc[0]))
        ranked = louder[louder["effect"] == effect].nlargest(probe.chosen, "delta")
        chosen = tuple(sorted(int(b) for b in ranked["block"]))
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
        self._run("controls", list(dict.fromkeys(sets.values())))
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
        full = pictures(probe.model_copy(update={"group": 1}), blocks, self.images)
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
        policy = part.policy(self.model, self.config.probe.scale)
        digest = hashlib.sha256(f"{policy.digest}-{part.split}-{part.images}".encode()).hexdigest()
        return f"probe-{digest[:16]}"

    def _run(self, stage: str, parts: list[Part]) -> dict[Part, float]:
        """Measure what is missing; the mean difference of alignment per part."""
        steps = self.config.generation.num_inference_steps

        def keep(job: Job) -> None:
            part, scores = job.tag, job.result.scores
            if begun := self._begun(part):
                before = self.run.read_scores(self._name(begun))
                scores = {name: np.concatenate([before[name], values]) for name, values in scores.items()}
            self.run.write_scores(self._name(part), self.prompts[part.split][: part.images], scores)
            self.display.advance(f"{part.effect} {list(part.blocks)}")

        jobs = []
        for part in parts:
            if not self._stored(part):
                one, begun = Candidate(part.policy(self.model, self.config.probe.scale), steps), self._begun(part)
                start = begun.images if begun else 0
                jobs.append(Job("measure", (one, part.split, self._reference, part.images, start), part))
        self.display.stage(stage, len(jobs))
        failed = self.pool.try_all(jobs, keep)
        for job in failed:
            self.refused.setdefault(job.tag.effect, str(job.error))
        for effect, reason in self.refused.items():
            self.display.say(f"{effect} is left out: {reason}")
        return {p: self._deltas(p, "all")["delta"] for p in parts if p.effect not in self.refused}

    def _stored(self, part: Part) -> bool:
        return (self.run.scores / f"{self._name(part)}.parquet").exists()

    def _begun(self, part: Part) -> Part | None:
        """The same change on fewer pictures, where it was ranked by these."""
        fewer = replace(part, images=_few(self.images))
        return fewer if fewer.images < part.images and self._stored(fewer) else None

    def _deltas(self, part: Part, kind: str) -> dict[str, Any]:
        after: Table = self.run.read_scores(self._name(part))
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
        kinds = ["all", *dict.fromkeys(p.kind for p in self.prompts["search"][: self.images])]
        rows = [
            {"block": p.blocks[0], "effect": p.effect, "window": f"{p.window[0]:g}-{p.window[1]:g}", "kind": kind}
            | self._deltas(p, kind)
            | {"whole": p.images == self.images}
            for p in parts
            for kind in kinds
        ]
        return pd.DataFrame(rows)

    def _write(self, table: Table, name: str) -> None:
        beside = self.run.path / f"{name}.new"
        table.to_parquet(beside, index=False)
        beside.replace(self.run.path / name)


def pictures(probe: ProbeConfig, num_blocks: int, images: int) -> int:
    """How many are drawn of blocks and of their groups, where each part has all of `images` or the few that rank it."""
    cases = len(probe.effects) * len(probe.windows)
    if probe.group == 1:
        return cases * num_blocks * images
    groups = math.ceil(num_blocks / probe.group)
    inside = min(math.ceil(groups / KEPT) * probe.group, num_blocks)
    few = _few(images)
    return cases * ((groups + inside) * few + min(probe.chosen, inside) * (images - few))


def _few(images: int) -> int:
    return min(images, max(2, math.ceil(images / FEW)))


def _parts(cases: dict[Case, list[Blocks]], images: int) -> list[Part]:
    return [Part(effect, b, window, images) for (effect, window), blocks in cases.items() for b in blocks]


def _window(told: str) -> tuple[float, float]:
    start, end = told.split("-")
    return float(start), float(end)


def best_blocks(table: Table, effect: str, count: int) -> list[int]:
    """The `count` blocks that an effect marks as the best, over all windows, best first."""
    rows = table[(table["effect"] == effect) & (table["kind"] == "all") & table["whole"]]
    means = rows.groupby("block")["delta"].mean() * EFFECTS[effect][1]
    return [int(b) for b in means.nlargest(count).index]


def draw(table: Table, num_blocks: int, path: Path) -> None:
    """A heat map block x effect for each kind of prompt; a dot marks what differs from zero by its interval.

    Blocks that fell out on fewer pictures are shown by these.
    """
    kinds, effects = list(dict.fromkeys(table["kind"])), list(dict.fromkeys(table["effect"]))
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 + columns * (1.2 + 0.28 * num_blocks), 0.6 + rows * (1.0 + 0.3 * len(effects))),
        layout="constrained", squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    limit = 100 * float(np.nanquantile(table["delta"].abs(), 0.98)) or 1.0
    image = None
    for axis, kind in zip(axes.flat, kinds, strict=False):
        of_kind = table[table["kind"] == kind].groupby(["effect", "block"])[["delta", "low", "high"]].mean()
        grid = np.full((len(effects), num_blocks), np.nan)
        for (effect, block), told in of_kind.iterrows():
            row = effects.index(effect)
            grid[row, block] = 100 * told["delta"]
            if told["low"] > 0 or told["high"] < 0:
                axis.plot(block, row, ".", ms=4, color="#1f2430")
        image = axis.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(kind, loc="left", fontsize=10)
        axis.set_yticks(range(len(effects)), effects, fontsize=8)
        axis.set_xticks(range(0, num_blocks, max(1, num_blocks // 12)))
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("alignment against the unmodified model, points", fontsize=9)
        bar.outline.set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def launch_probe(config: Config, path: Path) -> RunDirectory:
    """Probe into the run directory `path`, new or of the same model, prompts and objectives; and return it.

    Raises as `launch` does.
    """
    check_objectives(config)
    run = RunDirectory.open(path, config, resume=(path / "config.yaml").exists())
    with Display() as display:
        display.say("starting workers")
        pool = Pool(config, run.read_state().get("dtype"))
        try:
            run.write_json(run.state, run.read_state() | {"dtype": pool.description.dtype})
            display.say(f"{pool.size} on {pool.description.device}, {pool.description.dtype}")
            probe = Probe(config, run, pool, display)
            table = probe.measure()
            probe.controls(table)
            draw(table, probe.model.num_blocks, run.path / "probe.png")
        finally:
            pool.close()
            run.release()
    return run


def summary(run: RunDirectory) -> str:
    """What a probe found, in words: the best blocks of each effect, and what the controls gave."""
    table: Table = pd.read_parquet(run.path / "probe.parquet")
    count = run.load_config().probe.chosen
    lines = ["alignment against the unmodified model, points, with 95 % intervals"]
    for effect in dict.fromkeys(table["effect"]):
        rows = table[(table["effect"] == effect) & (table["kind"] == "all")].set_index("block")
        told = (f"{b} {_points(rows.loc[[b]].iloc[0])}" for b in best_blocks(table, effect, count))
        lines.append(f"{effect:<16} blocks " + ", ".join(told))
    if (run.path / "probe_sets.parquet").exists():
        lines += ["", "together, on held-out prompts"]
        sets: Table = pd.read_parquet(run.path / "probe_sets.parquet")
        for _, row in sets.iterrows():
            lines.append(f"{row['set']:<18} {row['effect']} at {[int(b) for b in row['blocks']]}: {_points(row)}")
    return "\n".join(lines)


def _points(row: Any) -> str:
    return f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
