"""Beginnings that runs have in common, computed once: what the transformer returned is kept and given again.

A run that has done so far just what an earlier run of the same pictures did is given the outputs of that run. The
pipeline's own loop and scheduler run as ever, so pictures are the same to the last bit, whatever a scheduler remembers
of earlier steps. A run can be taken up where no block holds a residual that it reuses later, so what a policy's blocks
keep never has to be stored.

Not covered, and computed as ever: pipelines whose scheduler does not tell the step, transformers behind
`torch.compile`. Seconds must never be measured through it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..policies import BlockPolicy, Plan, clock
from ..policies.architectures import resolve, unwrapped
from ..policies.policy import Branch

Key: TypeAlias = tuple[Hashable, bytes]  # the pictures, and a digest of what the run did up to a step, that included


@dataclass(frozen=True)
class Course:
    """What a run does: per step the digest of all that was done up to it, and where it can be taken up."""

    digests: tuple[bytes, ...]
    plain: int  # the steps before this one are those of the unmodified model
    spans: dict[int, int]  # from each step in front of which no residual is held to the next such step, or the end


@lru_cache(maxsize=64)
def course(policy: BlockPolicy | None, num_steps: int, start: int, branches: tuple[Branch, ...]) -> Course:
    """What a run under `policy` does from step `start` on; `branches` are guidance's, of a call each."""
    plans = [Plan.compile(policy, num_steps, start, branch) for branch in branches] if policy else []
    alone = [branches == ("both",) and not guided for guided in plans[0].guided] if plans else [False] * num_steps
    digest, digests, open_at, held, plain = repr((num_steps, start)).encode(), [], [], 0, num_steps
    for step in range(num_steps):
        rows = [plan.steps[step] for plan in plans]
        # that a residual is kept changes no output
        acts = [
            (n, i, b.kind, b.scales)
            for n, row in enumerate(rows)
            for i, b in enumerate(row)
            if b.kind != "compute" or b.scales
        ]
        if acts or alone[step]:
            plain = min(plain, step)
        if not held:
            open_at.append(step)
        held += sum(b.keeps - b.releases for row in rows for b in row)
        digest = hashlib.sha256(digest + repr((acts, alone[step])).encode()).digest()
        digests.append(digest)
    return Course(tuple(digests), plain, dict(pairwise([*open_at, num_steps])))


class Prefixes:
    """Outputs of one pipeline's transformer in main memory, at most `gib` of them.

    Those of the unmodified model stay once they are in: most candidates begin so, and of what is met in turn, batch
    after batch, replacing the oldest would throw out each just before it is wanted. Candidates' own leave when room is
    needed, the longest unused first.
    """

    def __init__(self, gib: float) -> None:
        self.size = self.room = int(gib * 2**30)  # bytes, and those left
        self.plain: dict[Key, list[Any]] = {}
        self.own: OrderedDict[Key, list[Any]] = OrderedDict()
        self.steps = 0  # of all runs so far
        self.given = 0  # of these, the steps that were not computed

    def known(self, key: Key) -> bool:
        return key in self.plain or key in self.own

    def recall(self, key: Key) -> list[Any]:
        """The outputs of the transformer's calls at a known step."""
        if key in self.plain:
            return self.plain[key]
        self.own.move_to_end(key)
        return self.own[key]

    def keep(self, key: Key, outputs: list[Any], plain: bool) -> None:
        """Takes in the outputs of a step's calls if there is room, or may be made."""
        size = _bytes(outputs)
        while self.room < size <= self.size and self.own:
            self.room += _bytes(self.own.popitem(last=False)[1])
        if self.room >= size:
            self.room -= size
            (self.plain if plain else self.own)[key] = outputs

    @contextmanager
    def shared(self, pipe: Any, policy: BlockPolicy | None, pictures: Hashable) -> Iterator[None]:
        """For one run of `pipe` under `policy`, already applied, that makes `pictures`: prompts, seeds, guidance."""
        transformer, architecture = resolve(pipe)
        compiled = pipe.transformer is not unwrapped(pipe.transformer)
        if not self.size or compiled or not clock.has_steps(pipe.scheduler):
            yield
            return
        branches: tuple[Branch, ...] = ("cond", "uncond") if architecture.guidance == "calls" else ("both",)
        # in front of the module's hooks: those of a policy must not wait for blocks that are not called
        inner = transformer._compiled_call_impl
        run = _Run(self, pipe, inner or transformer._call_impl, policy, pictures, branches)
        transformer._compiled_call_impl = run
        try:
            yield
        finally:
            transformer._compiled_call_impl = inner
        run.end()


class _Run:
    """Stands in for the transformer's call during one run of the pipeline."""

    def __init__(
        self,
        prefixes: Prefixes,
        pipe: Any,
        compute: Any,
        policy: BlockPolicy | None,
        pictures: Hashable,
        branches: tuple[Branch, ...],
    ) -> None:
        self.prefixes, self.pipe, self.compute, self.pictures = prefixes, pipe, compute, pictures
        self.policy, self.branches = policy, branches
        self.course: Course | None = None  # None before the first call
        self.step = -1  # of the last call
        self.given = False  # whether the step is known, and so all steps up to where the run can be taken up
        self.known: Iterator[Any] = iter(())  # its outputs, call by call
        self.made: dict[int, list[Any]] = {}  # what was computed, by step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tick = clock.read(self.pipe.scheduler)
        if tick.step != self.step:
            self._enter(tick)
        if self.given:
            device = self.pipe._execution_device
            return tree_map_only(torch.Tensor, lambda t: t.to(device, copy=True), next(self.known))
        output = self.compute(*args, **kwargs)
        self.made[self.step].append(tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), output))
        return output

    def _enter(self, tick: clock.Tick) -> None:
        self.course = self.course or course(self.policy, tick.num_steps, tick.step, self.branches)
        self.step = tick.step
        if self.step in self.course.spans:
            span = range(self.step, self.course.spans[self.step])
            self.given = all(self.prefixes.known(self._key(step)) for step in span)
        if self.given:
            self.known = iter(self.prefixes.recall(self._key(self.step)))
        else:
            self.made[self.step] = []
        self.prefixes.steps += 1
        self.prefixes.given += self.given

    def _key(self, step: int) -> Key:
        assert self.course is not None
        return self.pictures, self.course.digests[step]

    def end(self) -> None:
        """The run went well: what it computed may be given to others."""
        for step, outputs in self.made.items():
            assert self.course is not None
            if not self.prefixes.known(self._key(step)):  # of a span of which another step was missing
                self.prefixes.keep(self._key(step), outputs, plain=step < self.course.plain)


def _bytes(outputs: list[Any]) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
