"""Beginnings that runs have in common, computed once: what the transformer returned is kept and given again.

A run that has done so far just what an earlier run of the same pictures did is given the outputs of that run. The
pipeline's own loop and scheduler run as ever, so pictures are the same to the last bit, whatever a scheduler remembers
of earlier steps. What a policy's blocks keep is not stored: a step that makes a residual which the run reuses when it
is on its own is computed again.

Not covered, and computed as ever: pipelines whose scheduler does not tell the step, transformers behind
`torch.compile`. Seconds must never be measured through it.
"""

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..policies import Applied, BlockPolicy, Plan, clock
from ..policies.architectures import resolve, unwrapped
from ..policies.policy import Branch
from .outputs import Outputs, SharedOutputs


@dataclass(frozen=True)
class Course:
    """What a run does: per step the digest of all that was done up to it, and the steps whose residuals it reuses."""

    digests: tuple[bytes, ...]
    plain: int  # the steps before this one are those of the unmodified model
    needs: tuple[frozenset[int], ...]


@lru_cache(maxsize=64)
def course(policy: BlockPolicy | None, num_steps: int, start: int, branches: tuple[Branch, ...]) -> Course:
    """What a run under `policy` does from step `start` on; `branches` are guidance's, of a call each."""
    plans = [Plan.compile(policy, num_steps, start, branch) for branch in branches] if policy else []
    alone = [branches == ("both",) and not guided for guided in plans[0].guided] if plans else [False] * num_steps
    digest, digests, needs, plain = repr((num_steps, start)).encode(), [], [], num_steps
    made: dict[tuple[int, int], list[int]] = {}  # by call and block the last two steps that kept a residual
    for step in range(num_steps):
        acts, needed = [], set[int]()
        for n, plan in enumerate(plans):
            for i, block in enumerate(plan.steps[step]):
                reuses = block.kind == "reuse"
                if block.kind != "compute" or block.scales:
                    # that a residual is kept changes no output, but what it is of does, by rounding
                    of = (block.forecast, block.run) if reuses else None
                    acts.append((n, i, block.kind, block.scales, of))
                kept = made.get((n, i), [])
                if reuses:
                    needed |= set(kept if block.forecast else kept[-1:])
                if block.keeps:
                    made[n, i] = [*kept, step][-2:]
        if acts or alone[step]:
            plain = min(plain, step)
        digest = hashlib.sha256(digest + repr((acts, alone[step])).encode()).digest()
        digests.append(digest)
        needs.append(frozenset(needed))
    return Course(tuple(digests), plain, tuple(needs))


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
    def shared(self, pipe: Any, acting: Applied | None, pictures: str) -> Iterator[None]:
        """For one run of `pipe`, under the policy that is `acting`, that makes `pictures`: sampling, prompts, seeds."""
        transformer, architecture = resolve(pipe)
        compiled = pipe.transformer is not unwrapped(pipe.transformer)
        if compiled or not clock.has_steps(pipe.scheduler):
            yield
            return
        branches: tuple[Branch, ...] = ("cond", "uncond") if architecture.guidance == "calls" else ("both",)
        # in front of the module's hooks: those of a policy must not wait for blocks that are not called
        inner = transformer._compiled_call_impl
        run = _Run(self, pipe, inner or transformer._call_impl, acting, pictures, branches)
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
        acting: Applied | None,
        pictures: str,
        branches: tuple[Branch, ...],
    ) -> None:
        self.prefixes, self.pipe, self.compute = prefixes, pipe, compute
        self.pictures = hashlib.sha256(repr((prefixes.made_on, pictures)).encode()).digest()
        self.acting, self.branches = acting, branches
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
            if self.acting:
                self.acting.passed(kwargs)
            device = self.pipe._execution_device
            return tree_map_only(torch.Tensor, lambda t: t.to(device), next(self.given))
        output = self.compute(*args, **kwargs)
        self.made[self.step].append(tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), output))
        return output

    def _enter(self, tick: clock.Tick) -> None:
        self.step = tick.step
        if self.course is None:
            policy = self.acting.policy if self.acting else None
            self.course = course(policy, tick.num_steps, tick.step, self.branches)
            keys = [self._key(step) for step in range(tick.num_steps)]
            self.known = self.prefixes.outputs.recall(keys, self.course.needs)
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
