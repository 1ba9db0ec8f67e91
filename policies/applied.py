"""A policy at work: stand-ins take the place of blocks while the transformer's forward runs, only then."""

import inspect
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import clock
from .architectures import Architecture, Slot, block_slots, unwrapped
from .attention import ScaledAttention
from .blocks import ComputedBlock, ReusedBlock, SkippedBlock
from .error import PolicyError
from .layout import Layout
from .memory import Memory, within
from .neighbours import refuse_neighbours
from .plan import BlockStep, Plan
from .policy import BlockPolicy, Branch, ScaleText
from .report import Call, Report
from .rows import Rows, conditional, for_both
from .tokens import PromptWatch, Texts

# The name of the policy on each transformer that has one; kept here so that nothing is written on the model.
APPLIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(eq=False)
class _Lane:
    """The calls of a run that follow on each other step by step.

    A run has one lane, or one for each call that guidance makes at a step: residuals of one are not those of another.
    Memories and stand-ins outlive the run, so that a compiled model meets the same objects again.
    """

    branch: Branch
    plan: Plan | None = None  # None before the first call of the run
    step: int = -1  # of the last call
    memories: defaultdict[int, Memory] = field(default_factory=lambda: defaultdict(Memory))
    # The neighbours with which each block kept its residual last; it lies in the memory of the first.
    runs: dict[int, tuple[int, int]] = field(default_factory=dict)
    stand_ins: dict[tuple[int, BlockStep, Rows], SkippedBlock | ReusedBlock | ComputedBlock] = field(
        default_factory=dict
    )
    embeddings: torch.Tensor | None = None  # of the text, in the last call
    halved: bool = False  # whether only their conditional half was looked at
    texts: Texts | None = None  # behind them

    def forget(self) -> None:
        """Ends the run: frees what it cached."""
        self.plan = self.embeddings = None
        for memory in self.memories.values():
            memory.forget()


class Applied:
    """A policy at work on one transformer, until `remove()` or the end of the `with` block."""

    def __init__(
        self,
        policy: BlockPolicy,
        called: nn.Module,  # the transformer, or what torch.compile made of it
        architecture: Architecture,
        pipe: Any,
        scheduler: Any,
        cache_on_cpu: bool,
    ) -> None:
        self.policy = policy
        self._transformer = transformer = unwrapped(called)
        self._architecture = architecture
        self._slots = block_slots(transformer, architecture)
        self._parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._pipe = pipe
        self._scheduler = scheduler
        self._cache_on_cpu = cache_on_cpu
        acting = [rule for rule in policy.rules if rule.acts]
        self._halves = any(rule.branch != "both" for rule in acting)
        heard = {block for rule in acting if isinstance(rule.action, ScaleText) for block in rule.blocks}
        self._joined = any(self._slots[block].kind.streams == "joined" for block in heard)

        self._running = threading.Lock()  # held while a forward runs
        self._owner: int | None = None  # the thread that holds it
        self._swapped: list[tuple[Slot, nn.Module]] = []
        self._now: tuple[_Lane, Call] | None = None  # the running call
        self._halved = False  # whether it computes the conditional half of guidance alone

        self._tick: clock.Tick | None = None  # of the last call
        self._plan: Plan | None = None  # compiled last, for `_planned`
        self._planned: tuple[int, int, Branch] | None = None
        self._lanes: dict[str, _Lane] = {}
        self._context: str | None = None  # the name that the pipeline gave to the call
        self._done = 0  # calls that succeeded at this step
        self._conditional: Any = None  # what the conditional call returned at this step, where it stands for both
        self._calls: list[Call] = []
        self._cache_bytes = 0

        by_token = any(isinstance(r.action, ScaleText) and r.action.tokens != "all" for r in acting)
        self._watch = PromptWatch(pipe, architecture) if by_token else None
        self._names_calls = policy.acts and architecture.guidance == "calls" and hasattr(transformer, "cache_context")
        if self._names_calls:
            # the one attribute that is set on the model, and outside of its forward: pipelines name their calls by it
            self._cache_context = transformer.cache_context
            transformer.__dict__["cache_context"] = self._named

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
        APPLIED[transformer] = policy.name

    @property
    def report(self) -> Report:
        """What the last run did, or has done so far."""
        return Report(tuple(self._calls), self._cache_bytes)

    def remove(self) -> None:
        """Takes the policy off and frees what it cached; the model is as before. May be called again."""
        if self._removed:
            return
        self._removed = True
        for handle in self._handles:
            handle.remove()
        if self._transformer._compiled_call_impl == self._around_compiled:
            self._transformer._compiled_call_impl = self._compiled_call
        if self._watch:
            self._watch.remove()
        if self._names_calls and self._transformer.__dict__.get("cache_context") == self._named:
            del self._transformer.__dict__["cache_context"]
        self._restore()
        self._forget()
        del APPLIED[self._transformer]

    def passed(self, kwargs: dict[str, Any]) -> None:
        """Tells of a call of the transformer, with `kwargs`, that was answered without the transformer.

        Its blocks keep nothing then: residuals that a later call reuses must be of calls that were computed.
        """
        lane, _ = self._enter(self._left_out(kwargs) is not None)
        self._leave(lane)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @contextmanager
    def _named(self, name: str, **kwargs: Any) -> Iterator[None]:
        """In place of `transformer.cache_context`: remembers which of guidance's calls comes."""
        self._context = name
        try:
            with self._cache_context(name, **kwargs):
                yield
        finally:
            self._context = None

    def _around_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """The call of a transformer that was compiled in place."""
        args, kwargs = self._before(self._transformer, args, kwargs)
        output = None
        try:
            output = self._compiled_call(*args, **kwargs)
        finally:
            output = self._after(self._transformer, args, kwargs, output)
        return output

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """The arguments that the transformer is to be called with."""
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
        if not self._halved:
            return args, kwargs
        return conditional((args, kwargs), len(self._argument(args, kwargs, self._architecture.latents)))

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the transformer is to return; a hook that returns None changes nothing."""
        if self._owner != threading.get_ident() or self._now is None:  # always called: also after a refusal
            return output
        lane, call = self._now
        halved = self._halved
        idle = [i for i, slot in enumerate(self._slots) if not getattr(slot.block, "called", True)]
        self._end()
        if output is None or lane.plan is None:  # the forward failed; what its blocks kept is of no run
            lane.forget()
            return output
        if idle:
            lane.forget()
            raise PolicyError(
                f"Block {idle[0]} was not called where the policy acts on it: something else runs the blocks of this "
                "transformer in its own way, so take that off or the policy."
            )
        self._calls.append(call)
        if lane.plan.keeps:
            held = sum(memory.bytes for other in self._lanes.values() for memory in other.memories.values())
            self._cache_bytes = max(self._cache_bytes, held)
        self._leave(lane)
        return self._answer(lane, halved, output)

    def _leave(self, lane: _Lane) -> None:
        """A call succeeded: frees what no later step reuses."""
        self._done += 1
        assert lane.plan is not None
        for index, action in enumerate(lane.plan.steps[lane.step]):
            if action.releases:
                lane.memories[index].forget()
            elif action.forecast:
                lane.memories[index].forecast = None

    def _answer(self, lane: _Lane, halved: bool, output: Any) -> Any:
        """The output of the call, or at a step without guidance what stands for both halves."""
        if halved:
            return for_both(output)
        assert lane.plan is not None
        if not lane.plan.guided[lane.step]:
            if lane.branch == "cond":
                self._conditional = output
            elif lane.branch == "uncond":
                if self._conditional is None:
                    raise PolicyError("guidance_window needs the conditional call of a step before the unconditional.")
                return self._conditional
        return output

    def _argument(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """The argument of that name that the transformer is called with, or None."""
        if name in kwargs or name not in self._parameters:
            return kwargs.get(name)
        position = self._parameters.index(name)
        return args[position] if position < len(args) else None

    def _left_out(self, kwargs: dict[str, Any]) -> Any:
        """The blocks that a call of perturbed guidance leaves out; None for another call."""
        name = self._architecture.perturbed_by
        return kwargs.get(name) if name else None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the call's place in the run and swaps in the stand-ins of its step."""
        row, left_out = self._architecture, self._left_out(kwargs)
        lane, step = self._enter(left_out is not None)
        # what a ControlNet adds between blocks would be added again with the residual of a run
        added = (self._argument(args, kwargs, name) for name in self._parameters if "control" in name)
        self._halved = self._halves_batch(args, kwargs, lane, left_out is not None)
        apart = left_out is not None or any(value is not None for value in added)
        rows = None
        if any(action.touched for action in step):
            if row.filled_by and self._argument(args, kwargs, row.filled_by) is not None:
                raise PolicyError(f"{row.filled_by} fills a cache inside of the blocks; run without it under a policy.")
            rows = self._rows(args, kwargs, lane, left_out is not None)
        done: list[str] = []
        for index, action in enumerate(step):
            if left_out is not None and index in left_out:
                done.append("")
                continue
            if action.keeps:
                own = None if apart else action.run
                run = within(self._slots, index, own or (index, index))
                if index == run[0] and lane.runs.get(index) != run:
                    lane.memories[index].forget()  # an older residual is of other neighbours
                lane.runs[index] = run
            remembers = action.keeps or action.kind == "reuse"
            run = lane.runs.get(index, (index, index)) if remembers else (index, index)
            if action.kind == "reuse" and lane.memories[run[0]].residual is None:
                # Left out by guidance when it would have computed: nothing is cached, so it computes.
                action = BlockStep("compute", keeps=not action.releases, scales=action.scales)
            if index == run[0] and action.keeps:
                lane.memories[index].turn(lane.step, action.forecast)
            elif index == run[0] and action.forecast:
                lane.memories[index].aim(lane.step)
            done.append(action.kind + "+scale" * bool(action.scales))
            inside = action.kind == "compute" and not action.scales and index not in run
            if action.touched and rows is not None and not inside:
                slot = self._slots[index]
                action = replace(action, run=run)
                stand_in = lane.stand_ins.get((index, action, rows))
                if stand_in is None or not stand_in.stands_in_for(slot.block):
                    stand_in = self._stand_in(index, lane.memories[run[0]], action, rows)
                    lane.stand_ins[index, action, rows] = stand_in
                stand_in.called = False
                self._swapped.append((slot, slot.block))
                slot.children[slot.key] = stand_in
        self._now = lane, Call(lane.step, tuple(done), "cond" if self._halved else lane.branch)

    def _halves_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], lane: _Lane, perturbed: bool) -> bool:
        """Whether the call is of both halves of guidance, at a step where it does not act."""
        assert lane.plan is not None
        if lane.plan.guided[lane.step] or self._architecture.guidance != "batched":
            return False
        if perturbed or not self._pipe.do_classifier_free_guidance:
            return False
        self._refuse_no_halves(len(self._argument(args, kwargs, self._architecture.latents)), "a guidance_window")
        return True

    def _refuse_no_halves(self, batch: int, asking: str) -> None:
        if batch % 2 or getattr(self._pipe, "do_perturbed_attention_guidance", False):
            raise PolicyError(
                f"This batch of {batch} rows is not an unconditional and a conditional half, which {asking} asks for."
            )

    def _enter(self, perturbed: bool) -> tuple[_Lane, tuple[BlockStep, ...]]:
        """The lane of this call, moved to its step, and what each block does; begun anew where steps were left out."""
        tick = self._read()
        begins = tick.begins_run_after(self._tick)
        if begins:
            refuse_neighbours(self._transformer, self.policy, self._slots)
            self._forget()
            self._calls.clear()
            self._cache_bytes = 0
        if begins or self._tick is None or tick.step != self._tick.step:
            self._done = 0
        self._tick = tick
        lane = self._lane(perturbed)
        if lane.plan is None or tick.step not in (lane.step, lane.step + 1):
            if self._planned != (tick.num_steps, tick.step, lane.branch):
                self._planned = (tick.num_steps, tick.step, lane.branch)
                self._plan = Plan.compile(self.policy, *self._planned)
            lane.forget()
            lane.plan = self._plan
        elif tick.step == lane.step and lane.plan.keeps:
            raise PolicyError(
                f"The transformer was called twice at step {tick.step}; reuse cannot tell the residuals of two calls "
                "apart, so call it once per step of the scheduler."
            )
        assert lane.plan is not None
        lane.step = tick.step
        return lane, lane.plan.steps[tick.step]

    def _lane(self, perturbed: bool) -> _Lane:
        """The lane of a call: by the name that the pipeline gives it, else by its turn at this step."""
        branch: Branch = "both"
        if perturbed:
            name = "perturbed"
        elif self._architecture.guidance == "batched":
            name = "batched"
        else:
            name = self._context or f"call {self._done}"
            branch = "uncond" if (self._done if self._context is None else "uncond" in self._context) else "cond"
        if name not in self._lanes:
            self._lanes[name] = lane = _Lane(branch)
            lane.memories = defaultdict(lambda: Memory(self._cache_on_cpu))
        return self._lanes[name]

    def _read(self) -> clock.Tick:
        """This call's step; without a scheduler that counts, each call is a run of one step."""
        scheduler = self._scheduler if self._pipe is None else self._pipe.scheduler
        if clock.has_steps(scheduler):
            return clock.read(scheduler)
        clock.refuse_without_steps(self.policy, scheduler)
        return clock.Tick(step=0, num_steps=1, fresh=True, schedule=object())

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], lane: _Lane, perturbed: bool) -> Rows:
        """The batch as far as the policy asks for it; where rows do not differ, it does not matter."""
        row = self._architecture
        latents = self._argument(args, kwargs, row.latents)
        latents = latents if isinstance(latents, torch.Tensor) else latents[0]
        text = self._argument(args, kwargs, "encoder_hidden_states")
        registers = getattr(self._transformer, row.registers).shape[1] if row.registers else 0
        batch, guided = 1, False
        if self._halves and row.guidance == "batched":
            batch = latents.shape[0]
            guided = not perturbed and bool(self._pipe.do_classifier_free_guidance)
            if guided:
                self._refuse_no_halves(batch, "a branch other than 'both'")
            if self._halved:
                batch, guided = batch // 2, False
        if self._watch is not None:
            batch = len(text) // 2 if self._halved else len(text)
            if text is not lane.embeddings or lane.halved != self._halved:
                lane.texts, lane.embeddings = self._watch.texts(text[-batch:]), text
                lane.halved = self._halved
                lane.stand_ins.clear()  # those of other prompts are not met again
                self._refuse_missing(lane)
        joined = text.shape[1] + registers if self._joined else None
        return Rows(batch, guided, latents.device, latents.dtype, joined, lane.texts)

    def _refuse_missing(self, lane: _Lane) -> None:
        """A phrase that no prompt holds would change nothing; unconditional prompts need not hold it."""
        for i, rule in enumerate(self.policy.rules):
            if isinstance(rule.action, ScaleText) and isinstance(rule.action.tokens, tuple) and rule.acts:
                missing = lane.texts.missing(rule.action.tokens) if lane.texts and lane.branch != "uncond" else None
                if missing is not None:
                    raise PolicyError(
                        f"rules[{i}].action.tokens has {missing!r}, which stands in no prompt of this run."
                    )

    def _stand_in(
        self, index: int, memory: Memory, action: BlockStep, rows: Rows
    ) -> SkippedBlock | ReusedBlock | ComputedBlock:
        def factor(operand: str, scope: str | None = None) -> torch.Tensor | None:
            return rows.factor([(b, a) for b, a in action.scales if a.operand == operand and a.scope == scope])

        slot, (first, last) = self._slots[index], action.run or (index, index)
        block, kind = slot.block, slot.kind
        layout = Layout(kind.streams, rows.text_tokens)
        stream = factor("input", "propagate")
        if action.kind == "skip" or (action.kind == "reuse" and index != first):
            return SkippedBlock(block, layout)
        if action.kind == "reuse":
            return ReusedBlock(block, layout, memory, stream)
        factors = factor("key"), factor("value"), factor("logit")
        attention = None
        if any(f is not None for f in factors):
            attention = ScaledAttention(getattr(block, kind.attention), kind.text_keys, *factors)
        kept = memory if action.keeps else None
        local = factor("input", "local")
        return ComputedBlock(
            block, layout, kept, stream, local, kind.attention, attention, index == first, index == last
        )

    def _restore(self) -> None:
        while self._swapped:
            slot, block = self._swapped.pop()
            slot.children[slot.key] = block

    def _forget(self) -> None:
        self._conditional = None
        for lane in self._lanes.values():
            lane.forget()

    def _end(self) -> None:
        self._restore()
        self._now = self._owner = None
        self._halved = False
        self._running.release()
