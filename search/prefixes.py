"""Beginnings that runs have in common, computed once: what the transformer returned is kept and given again.

A run that has done so far just what an earlier run of the same pictures did is given the outputs of that run. The
pipeline's own loop and scheduler run as ever, so pictures are the same to the last bit, whatever a scheduler remembers
of earlier steps. A run can be taken up where no block holds a residual that it reuses later, so what a policy's blocks
keep never has to be stored.

Not covered, and computed as ever: pipelines whose scheduler does not tell the step, transformers behind
`torch.compile`. Seconds must never be measured through it.
"""

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..policies import BlockPolicy, Plan, clock
from ..policies.architectures import resolve, unwrapped
from ..policies.policy import Branch
from .outputs import Outputs, SharedOutputs


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
            (n, i, b.kind, b.scales, b.forecast and b.kind == "reuse")
            for n, row in enumerate(rows)
            for i, b in enumerate(row)
            if b.kind != "compute" or b.scales
        ]
        if acts or alone[step]:
            plain = min(plain, step)
        if not held:
            open_at.append(step)
        held += sum((b.keeps and not b.forecast) - b.releases for row in rows for b in row)
        digest = hashlib.sha256(digest + repr((acts, alone[step])).encode()).digest()
        digests.append(digest)
    return Course(tuple(digests), plain, dict(pairwise([*open_at, num_steps])))


class Prefixes:
    """The beginnings that runs of one pipeline share with others, by the outputs of its transformer.

    `made_on` tells the device apart from others, which round otherwise; `stage` the pictures that are made now from
    those of before.
    """

    def __init__(self, outputs: Outputs | SharedOutputs, made_on: str = "") -> None:
        self.outputs, self.made_on, self.stage = outputs, made_on, ""
        self.steps = 0  # of all runs so far
        self.given = 0  # of these, the steps that were not computed

    @contextmanager
    def shared(self, pipe: Any, policy: BlockPolicy | None, pictures: str) -> Iterator[None]:
        """For one run of `pipe` under `policy`, already applied, that makes `pictures`: sampling, prompts, seeds."""
        transformer, architecture = resolve(pipe)
        compiled = pipe.transformer is not unwrapped(pipe.transformer)
        if compiled or not clock.has_steps(pipe.scheduler):
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
        pictures: str,
        branches: tuple[Branch, ...],
    ) -> None:
        self.prefixes, self.pipe, self.compute = prefixes, pipe, compute
        self.pictures = hashlib.sha256(repr((prefixes.made_on, pictures)).encode()).digest()
        self.policy, self.branches = policy, branches
        self.course: Course | None = None  # None before the first call
        self.step = -1  # of the last call
        self.known: dict[bytes, bytes] = {}  # what others made of this run
        self.given: Iterator[Any] | None = None  # the outputs of a step that is known, call by call
        self.made: dict[int, list[Any]] = {}  # what was computed, by step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tick = clock.read(self.pipe.scheduler)
        if tick.step != self.step:
            self._enter(tick)
        if self.given is not None:
            device = self.pipe._execution_device
            return tree_map_only(torch.Tensor, lambda t: t.to(device), next(self.given))
        output = self.compute(*args, **kwargs)
        self.made[self.step].append(tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), output))
        return output

    def _enter(self, tick: clock.Tick) -> None:
        self.step = tick.step
        if self.course is None:
            self.course = course(self.policy, tick.num_steps, tick.step, self.branches)
            spans = [[self._key(step) for step in range(*span)] for span in self.course.spans.items()]
            self.known = self.prefixes.outputs.recall(spans)
        known = self.known.get(self._key(self.step))
        self.given = None if known is None else iter(pickle.loads(known))
        if known is None:
            self.made[self.step] = []
        self.prefixes.steps += 1
        self.prefixes.given += known is not None

    def _key(self, step: int) -> bytes:
        """Of the pictures, and of what the run did up to a step, that included."""
        assert self.course is not None
        return hashlib.sha256(self.pictures + self.course.digests[step]).digest()

    def end(self) -> None:
        """The run went well: what it computed may be given to others."""
        if self.made:
            assert self.course is not None
            keys = {step: self._key(step) for step in self.made}
            made = {keys[step]: pickle.dumps(outputs) for step, outputs in self.made.items()}
            plain = {key for step, key in keys.items() if step < self.course.plain}
            self.prefixes.outputs.keep(made, plain, self.prefixes.stage)
