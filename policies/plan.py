"""A policy laid out over a run: what each block does at each step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal, Self, TypeAlias

from .policy import BlockPolicy, Branch, Reuse, Rule, ScaleText, Skip

Kind: TypeAlias = Literal["compute", "skip", "reuse"]


@dataclass(frozen=True)
class BlockStep:
    """What one block does at one step."""

    kind: Kind = "compute"
    keeps: bool = False  # computes a residual that a later step reuses
    releases: bool = False  # is the last step to reuse its residual
    # reuses: adds what the line through the last two residuals says of this step; keeps: the one before stays for that
    forecast: bool = False
    scales: tuple[tuple[Branch, ScaleText], ...] = ()  # that act at this step, in an order of their own
    # The first and last of neighbours that keep, and later reuse, one residual together: what the last returned minus
    # what the first was given. None: the block keeps its own.
    run: tuple[int, int] | None = None

    @property
    def attends_scaled(self) -> bool:
        """Whether text is scaled inside the attention."""
        return any(action.operand != "input" for _, action in self.scales)

    @property
    def touched(self) -> bool:
        """False when the block runs as if there were no policy."""
        return self != BlockStep()


@dataclass(frozen=True)
class Counts:
    """Block calls of a run by what they did; `scaled` ones computed or reused, with the text scaled."""

    computed: int
    skipped: int
    reused: int
    scaled: int


@dataclass(frozen=True)
class Plan:
    """What each block does at each of the `num_steps` steps of a run that begins at step `start`.

    It covers one call of the transformer per step: the whole batch, or one branch of guidance in a call of its own.
    Where that is the unconditional one, its blocks are skipped at steps without guidance.
    """

    num_steps: int
    start: int
    steps: tuple[tuple[BlockStep, ...], ...]  # steps x blocks; a step before `start` is an empty tuple
    guided: tuple[bool, ...]  # whether guidance acts at each step, if the pipeline guides

    @classmethod
    def compile(cls, policy: BlockPolicy, num_steps: int, start: int = 0, branch: Branch = "both") -> Self:
        """Lays `policy` out over steps `start` to `num_steps - 1`; a late start, too, starts with nothing cached.

        With `branch` for the calls of that branch alone, whose rows then all hear what the branch hears.
        """
        rules: list[list[Rule]] = [[] for _ in range(policy.model.num_blocks)]
        for rule in policy.rules:
            if branch != "both" and rule.branch == branch:
                rule = rule.model_copy(update={"branch": "both"})
            if rule.acts and (branch == "both" or rule.branch == "both"):
                for block in rule.blocks:
                    rules[block].append(rule)
        first, last = policy.guidance_window
        guided = tuple(first <= i / num_steps < last for i in range(num_steps))
        alike = {tuple(map(id, of_block)): of_block for of_block in rules}  # blocks of one band share their column
        made = {key: _block_steps(of_block, guided, start, branch) for key, of_block in alike.items()}
        columns = [made[tuple(map(id, of_block))] for of_block in rules]
        empty: tuple[BlockStep, ...] = ()
        return cls(num_steps, start, (empty,) * start + tuple(zip(*_in_runs(columns), strict=True)), guided)

    @cached_property
    def kinds(self) -> list[list[Kind]]:
        """Steps x blocks of what each does; a block that computes with scaled text is "compute"."""
        return [[block.kind for block in step] for step in self.steps]

    @cached_property
    def work(self) -> list[list[Kind]]:
        """`kinds`, but of a run that reuses one residual only the first block adds it, and the others do nothing."""
        return [
            ["skip" if b.kind == "reuse" and b.run and b.run[0] != i else b.kind for i, b in enumerate(step)]
            for step in self.steps
        ]

    @cached_property
    def keeps(self) -> bool:
        """Whether any block reuses a residual at any step."""
        return any(block.keeps for step in self.steps for block in step)

    def counts(self) -> Counts:
        """Block calls of the whole run."""
        calls = [block for step in self.steps for block in step]
        kinds = [block.kind for block in calls]
        scaled = sum(bool(block.scales) for block in calls)
        return Counts(kinds.count("compute"), kinds.count("skip"), kinds.count("reuse"), scaled)


def _in_runs(columns: list[list[BlockStep]]) -> list[list[BlockStep]]:
    """The columns, with neighbours that reuse alike for as long as they hold a residual made one run."""
    told = [list(column) for column in columns]
    alike = {id(column): column for column in columns}  # blocks of one band have one, and the steps in it
    made: dict[tuple[int, tuple[int, int]], BlockStep] = {}
    for at in range(len(columns[0])):
        of_band = {key: _alike(column, at) for key, column in alike.items()}
        spans = [of_band[id(column)] for column in columns]
        for span, members in groupby(range(len(columns)), spans.__getitem__):
            blocks = list(members)
            run = blocks[0], blocks[-1]
            for block in blocks if len(blocks) > 1 else ():
                for i, (kind, _) in enumerate(span, at):
                    if kind != "skip":
                        own = columns[block][i]
                        if (id(own), run) not in made:
                            made[id(own), run] = replace(own, run=run)
                        told[block][i] = made[id(own), run]
    return told


def _alike(column: Sequence[BlockStep], at: int) -> tuple[tuple[Kind, bool], ...]:
    """What a block does from the step at which it begins to hold a residual to the last that reuses one.

    Empty where it does not begin to, or where text is scaled in front of it on the way: its neighbour then gives it
    other text than the residual was counted from.
    """
    kinds: list[tuple[Kind, bool]] = []
    for step in column[at:] if column[at].keeps and not column[at].forecast else ():
        if any(action.operand == "input" and action.scope == "propagate" for _, action in step.scales):
            return ()
        kinds.append((step.kind, step.forecast))
        if step.releases:
            break
    return tuple(kinds)


def _block_steps(rules: Sequence[Rule], guided: Sequence[bool], start: int, branch: Branch) -> list[BlockStep]:
    """One block's column of the plan, for steps from `start` on."""
    kinds: list[Kind] = []
    scales: list[tuple[tuple[Branch, ScaleText], ...]] = []
    lines: list[bool] = []  # whether a forecast is added
    computed_at: int | None = None
    before: int | None = None  # the step that computed before that
    num_steps = len(guided)
    for i in range(start, num_steps):
        if branch == "uncond" and not guided[i]:
            kinds.append("skip")
            scales.append(())
            lines.append(False)
            continue
        if branch == "both" and i > start and guided[i] and not guided[i - 1]:
            computed_at = before = None  # of the unconditional half there is no residual
        active = [rule for rule in rules if rule.window[0] <= i / num_steps < rule.window[1]]
        kind: Kind = "compute"
        line = False
        for rule in active:
            if isinstance(rule.action, Skip):
                kind = "skip"
            elif isinstance(rule.action, Reuse) and computed_at is not None:
                every = rule.action.every
                kind = "reuse" if every is None or i - computed_at < every else "compute"
                line = kind == "reuse" and rule.action.forecast == "linear" and before is not None
        if kind == "compute":
            before, computed_at = computed_at, i
        heard: list[tuple[Branch, ScaleText]] = [
            (rule.branch, rule.action) for rule in active if isinstance(rule.action, ScaleText)
        ]
        # A block that reuses does not attend; only a scale of the running stream acts in front of it.
        heard = [(b, a) for b, a in heard if kind == "compute" or a.scope == "propagate"]
        kinds.append(kind)
        lines.append(line)
        scales.append(tuple(sorted(heard, key=lambda pair: (pair[1].operand, pair[0], pair[1].tokens))))
    column: list[BlockStep] = []
    needed = False  # whether a later step reuses the residual that is current at this one
    older = False  # and with it, for a forecast, the one before
    for kind, acting, line in zip(reversed(kinds), reversed(scales), reversed(lines), strict=True):
        if kind == "compute":
            column.append(BlockStep(kind, keeps=needed, scales=acting, forecast=older))
            needed, older = older, False
        else:
            column.append(BlockStep(kind, releases=kind == "reuse" and not needed, scales=acting, forecast=line))
            needed, older = needed or kind == "reuse", older or line
    return column[::-1]
