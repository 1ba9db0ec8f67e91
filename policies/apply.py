"""How a pipeline obeys a policy: stand-ins take the place of blocks while the transformer's forward runs, only then."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import clock
from .architectures import Architecture, block_slots, resolve, unwrapped
from .attention import ScaledJointAttention
from .blocks import ComputedBlock, Memory, ReusedBlock, SkippedBlock
from .error import PolicyError
from .plan import BlockStep, Plan
from .policy import BlockPolicy, ModelIdentity, ScaleText
from .report import Call, Report
from .rows import Rows

# The name of the policy on each transformer that has one; kept here so that nothing is written on the model.
_APPLIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(eq=False)
class _Lane:
    """The calls of a run that follow on each other step by step.

    A run has one lane, or two when the pipeline makes an extra, perturbed call per step; residuals of one are not
    those of the other. Memories and stand-ins outlive the run, so that a compiled model meets the same objects again.
    """

    plan: Plan | None = None  # None before the first call of the run
    step: int = -1  # of the last call
    memories: defaultdict[int, Memory] = field(default_factory=lambda: defaultdict(Memory))
    stand_ins: dict[tuple[int, BlockStep, Rows], nn.Module] = field(default_factory=dict)

    def forget(self) -> None:
        """Ends the run: frees what it cached."""
        self.plan = None
        for memory in self.memories.values():
            memory.residual = None


class Applied:
    """A policy at work on one transformer, until `remove()` or the end of the `with` block."""

    def __init__(
        self,
        policy: BlockPolicy,
        called: nn.Module,  # the transformer, or what torch.compile made of it
        architecture: Architecture,
        pipe: Any,
        scheduler: Any,
    ) -> None:
        self.policy = policy
        self._transformer = transformer = unwrapped(called)
        self._architecture = architecture
        self._slots = block_slots(transformer, architecture)
        self._pipe = pipe
        self._scheduler = scheduler
        self._halves = any(rule.branch != "both" for rule in policy.rules if rule.acts)

        self._running = threading.Lock()  # held while a forward runs
        self._owner: int | None = None  # the thread that holds it
        self._swapped: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._now: tuple[_Lane, Call] | None = None  # the running call

        self._tick: clock.Tick | None = None  # of the last call
        self._plan: Plan | None = None  # compiled last
        self._lanes = {False: _Lane(), True: _Lane()}  # by whether the call is a perturbed one
        self._calls: list[Call] = []

        # The hooks stay outside of whatever is compiled: around the wrapper that `torch.compile(transformer)` made, or
        # around the call that `transformer.compile()` put in place of the module's own.
        self._removed = False
        self._compiled_call: Any = transformer._compiled_call_impl
        self._handles: list[RemovableHandle] = []
        if called is transformer and self._compiled_call is not None:
            transformer._compiled_call_impl = self._around_compiled
        else:
            self._handles.append(called.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(called.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        _APPLIED[transformer] = policy.name

    @property
    def report(self) -> Report:
        """What the last run did, or has done so far."""
        return Report(tuple(self._calls))

    def remove(self) -> None:
        """Takes the policy off and frees what it cached; the model is as before. May be called again."""
        if self._removed:
            return
        self._removed = True
        for handle in self._handles:
            handle.remove()
        if self._transformer._compiled_call_impl == self._around_compiled:
            self._transformer._compiled_call_impl = self._compiled_call
        self._restore()
        self._forget()
        del _APPLIED[self._transformer]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _around_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """The call of a transformer that was compiled in place."""
        self._before(self._transformer, args, kwargs)
        output = None
        try:
            output = self._compiled_call(*args, **kwargs)
        finally:
            self._after(self._transformer, args, kwargs, output)
        return output

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise PolicyError("The transformer was compiled under a policy; compile it first, then apply the policy.")
        if not self._running.acquire(blocking=False):
            if self._owner != threading.get_ident():
                raise PolicyError(
                    "Another thread is in a forward of this transformer; under a policy, run one at a time."
                )
            self._restore()  # an interrupt (Ctrl-C) left that forward without its post-hook
            self._forget()
        self._owner = threading.get_ident()
        try:
            self._begin(args, kwargs)
        except BaseException:
            self._end()
            raise

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._owner != threading.get_ident() or self._now is None:  # always called: also after a refusal
            return
        lane, call = self._now
        self._end()
        if output is None or lane.plan is None:  # the forward failed; what its blocks kept is of no run
            lane.forget()
            return
        self._calls.append(call)
        for index, action in enumerate(lane.plan.steps[call.step]):
            if action.releases:
                lane.memories[index].residual = None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the call's place in the run and swaps in the stand-ins of its step."""
        perturbed_by = self._architecture.perturbed_by
        left_out = kwargs.get(perturbed_by) if perturbed_by else None
        lane, step = self._enter(left_out is not None)
        rows = self._rows(args, kwargs, left_out is not None)
        done: list[str] = []
        for index, action in enumerate(step):
            if left_out is not None and index in left_out:
                done.append("")
                continue
            if action.kind == "reuse" and lane.memories[index].residual is None:
                # Left out by guidance when it would have computed: nothing is cached, so it computes.
                action = BlockStep("compute", keeps=not action.releases, scales=action.scales)
            done.append(action.kind + "+scale" * bool(action.scales))
            if action.touched:
                children, key = self._slots[index]
                block = children[key]
                assert block is not None
                self._refuse_processor(block, index, action)
                stand_in = lane.stand_ins.get((index, action, rows))
                if stand_in is None or stand_in.block is not block:
                    stand_in = self._stand_in(block, lane.memories[index], action, rows)
                    lane.stand_ins[index, action, rows] = stand_in
                self._swapped.append((children, key, block))
                children[key] = stand_in
        self._now = lane, Call(lane.step, tuple(done))

    def _enter(self, perturbed: bool) -> tuple[_Lane, tuple[BlockStep, ...]]:
        """The lane of this call, moved to its step, and what each block does; begun anew where steps were left out."""
        tick = self._read()
        if tick.begins_run_after(self._tick):
            self._forget()
            self._calls.clear()
        self._tick = tick
        lane = self._lanes[perturbed]
        if lane.plan is None or tick.step not in (lane.step, lane.step + 1):
            if self._plan is None or (self._plan.num_steps, self._plan.start) != (tick.num_steps, tick.step):
                self._plan = Plan.compile(self.policy, tick.num_steps, tick.step)
            lane.forget()
            lane.plan = self._plan
        elif tick.step == lane.step and lane.plan.keeps:
            raise PolicyError(
                f"The transformer was called twice at step {tick.step}; reuse cannot tell the residuals of two calls "
                "apart, so call it once per step of the scheduler."
            )
        lane.step = tick.step
        return lane, lane.plan.steps[tick.step]

    def _read(self) -> clock.Tick:
        """This call's step; without a scheduler that counts, each call is a run of one step."""
        scheduler = self._scheduler if self._pipe is None else self._pipe.scheduler
        if clock.has_steps(scheduler):
            return clock.read(scheduler)
        _refuse_without_step(self.policy, scheduler)
        return clock.Tick(step=0, num_steps=1, fresh=True, schedule=object())

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], perturbed: bool) -> Rows:
        latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        if not self._halves:  # rows do not differ, so the batch does not matter
            return Rows(1, False, latents.device, latents.dtype)
        batch = latents.shape[0]
        guided = not perturbed and bool(self._pipe.do_classifier_free_guidance)
        if guided and (batch % 2 or getattr(self._pipe, "do_perturbed_attention_guidance", False)):
            raise PolicyError(
                f"This batch of {batch} rows is not an unconditional and a conditional half; use branch 'both' here."
            )
        return Rows(batch, guided, latents.device, latents.dtype)

    def _stand_in(self, block: nn.Module, memory: Memory, action: BlockStep, rows: Rows) -> nn.Module:
        def factor(operand: str, scope: str | None = None) -> torch.Tensor | None:
            return rows.factor([(b, a.scale) for b, a in action.scales if a.operand == operand and a.scope == scope])

        row = self._architecture
        stream = factor("input", "propagate")
        if action.kind == "skip":
            return SkippedBlock(block, row)
        if action.kind == "reuse":
            return ReusedBlock(block, row, memory, stream)
        factors = factor("key"), factor("value"), factor("logit")
        attention = None if all(f is None for f in factors) else ScaledJointAttention(*factors)
        kept = memory if action.keeps else None
        return ComputedBlock(block, row, kept, stream, factor("input", "local"), attention)

    def _refuse_processor(self, block: nn.Module, index: int, action: BlockStep) -> None:
        """A scale inside the attention is our arithmetic, which must be that of the processor it takes the place of."""
        if action.attends_scaled:
            processor = type(getattr(block, self._architecture.attention).processor).__name__
            if processor not in self._architecture.processors:
                needed = " or ".join(self._architecture.processors)
                raise PolicyError(
                    f"Block {index} attends by {processor}; scale_text of key, value or logit needs {needed}."
                )

    def _restore(self) -> None:
        while self._swapped:
            children, key, block = self._swapped.pop()
            children[key] = block

    def _forget(self) -> None:
        for lane in self._lanes.values():
            lane.forget()

    def _end(self) -> None:
        self._restore()
        self._now = self._owner = None
        self._running.release()


def apply_policy(pipe_or_transformer: Any, policy: BlockPolicy, *, scheduler: Any = None) -> Applied:
    """Makes a diffusers pipeline, or its transformer alone, obey `policy` from now on.

    Use it as a context manager or call `.remove()`; `.report` tells what the last run did. A policy whose rules change
    nothing leaves the model's arithmetic untouched, to the bit. The step of each call is the scheduler's `step_index`:
    the pipeline's own, or for a bare transformer that of `scheduler`, which whole-run skips and text scales do without.
    Rules for one branch need the pipeline that makes the calls, which tells whether guidance is on; when it is off
    every row is conditional. Compile the transformer before, not while, a policy is applied.

    Raises PolicyError (one sentence) when the policy is for another architecture, asks for what this architecture or
    pipeline cannot do, or when a policy is already applied to this transformer; and from inside a forward that runs
    while another thread's does, or that is called twice at one step by a policy that reuses.

    Not covered: `tokens` other than `all`. A transformer compiled as a whole is compiled once per distinct pattern of
    actions, of which torch allows 8 by default (`torch._dynamo.config.recompile_limit`); regional compilation is not.
    """
    transformer, architecture = resolve(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    if pipe is not None and scheduler is not None:
        raise PolicyError("scheduler is for a bare transformer; a pipeline brings its own.")
    _refuse_other_model(policy, ModelIdentity.of(transformer))
    for i, rule in enumerate(policy.rules):
        if not rule.acts:
            continue
        if rule.branch != "both" and not isinstance(rule.action, ScaleText) and architecture.batched_guidance:
            raise PolicyError(
                f"rules[{i}].branch is {rule.branch!r} on a {rule.action.type}; {architecture.transformer} runs both "
                "halves of guidance in one call, so a block can be left out for both halves only."
            )
        if rule.branch != "both" and not hasattr(type(pipe), "do_classifier_free_guidance"):
            raise PolicyError(
                f"rules[{i}].branch is {rule.branch!r}; a half of guidance can be told only with a pipeline that has "
                "do_classifier_free_guidance, so apply to that or use 'both'."
            )
        if isinstance(rule.action, ScaleText) and rule.action.tokens != "all":
            raise PolicyError(f"rules[{i}].action.tokens is {rule.action.tokens!r}; this version can apply only 'all'.")
    _refuse_without_step(policy, scheduler if pipe is None else pipe.scheduler)
    if transformer in _APPLIED:
        raise PolicyError(f"Policy {_APPLIED[transformer]!r} is already applied to this transformer; remove it first.")
    return Applied(policy, pipe_or_transformer if pipe is None else pipe.transformer, architecture, pipe, scheduler)


def _refuse_other_model(policy: BlockPolicy, found: ModelIdentity) -> None:
    wanted = policy.model
    if wanted.transformer != found.transformer:
        raise PolicyError(f"model.transformer is {wanted.transformer}; the model here is a {found.transformer}.")
    if wanted.num_blocks != found.num_blocks:
        raise PolicyError(f"model.num_blocks is {wanted.num_blocks}; the model here has {found.num_blocks} blocks.")
    if wanted.fingerprint != found.fingerprint:
        raise PolicyError(
            f"model.fingerprint is {wanted.fingerprint[:12]}...; the config of the model here gives "
            f"{found.fingerprint[:12]}..., so it is another architecture."
        )


def _refuse_without_step(policy: BlockPolicy, scheduler: Any) -> None:
    asks = [i for i, rule in enumerate(policy.rules) if rule.needs_step]
    if asks and not clock.has_steps(scheduler):
        lacks = "no scheduler was given" if scheduler is None else f"{type(scheduler).__name__} has no step_index"
        raise PolicyError(f"rules[{asks[0]}] has a window or reuses, which takes the step of the run, but {lacks}.")
