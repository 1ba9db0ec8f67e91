"""Seconds of a generation: timed directly, or predicted for a policy from a cost table measured block by block.

Covered: every architecture that policies know, on CPU and CUDA; a step is one call of the transformer.
Not covered: what a policy adds beside its blocks (storing residuals, masks), and compiled transformers; time the
policy itself with `time_runs` before a number is claimed.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, model_validator

from ..policies import BlockPolicy, Plan, Rule, ScaleText, apply_policy
from ..policies.architectures import ARCHITECTURES, block_slots, resolve
from ..policies.policy import Branch, Operand
from .evaluator import as_array

_ADDITIONS = 20  # residual additions timed together


class CostTable(BaseModel):
    """What each part of a run costs, in seconds, for one batch on one device. Medians of `repeats` runs.

    A prediction holds for this batch, size, device, dtype and number of threads only. Scaling `input` is free here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    block_compute: tuple[NonNegativeFloat, ...]  # one forward of each block
    block_reuse: tuple[NonNegativeFloat, ...]  # adding each block's stored residuals
    # by operand, what scaling text in a block's attention adds to its forward; nothing where it was not measured
    block_scaled: dict[str, tuple[NonNegativeFloat, ...]] = {}
    # what remains of a step's cost where one call is of both halves of guidance and only the conditional is computed
    unguided: NonNegativeFloat = 1.0
    block_skip: NonNegativeFloat = 0.0  # a call of a thin wrapper, microseconds: not measured
    step_overhead: NonNegativeFloat  # per step beside the blocks: embeddings, guidance, scheduler
    step_outside: NonNegativeFloat = 0.0  # of that, outside of the transformer; 0 in tables that did not tell
    run_overhead: NonNegativeFloat  # per run beside the denoising loop: text encoders, decoder
    run_seconds: NonNegativeFloat  # a whole run of the unmodified model, as measured
    steps: PositiveInt  # calls of the transformer in the measured run
    calls_per_step: PositiveInt = 1  # of the scheduler: 2 where guidance makes a call for each half
    repeats: PositiveInt
    batch: PositiveInt  # images per run
    rows: PositiveInt  # rows of the transformer's batch: twice the images under batched guidance
    height: PositiveInt
    width: PositiveInt
    device: str
    dtype: str
    threads: PositiveInt

    @model_validator(mode="after")
    def _one_cost_per_block(self):
        if len(self.block_compute) != len(self.block_reuse):
            counts = f"{len(self.block_compute)} and {len(self.block_reuse)}"
            raise ValueError(f"block_compute and block_reuse have {counts} entries; accepted: one per block in both")
        for operand, costs in self.block_scaled.items():
            if len(costs) != len(self.block_compute):
                accepted = f"{len(self.block_compute)}, one per block"
                raise ValueError(f"block_scaled.{operand} has {len(costs)} entries; accepted: {accepted}")
        return self

    @property
    def guided(self) -> bool:
        """Whether the measured runs computed an unconditional half."""
        return self.rows > self.batch or self.calls_per_step > 1

    def predict_policy(self, policy: BlockPolicy, num_steps: int) -> float:
        """Seconds of a run of `num_steps` steps of the scheduler under `policy`."""
        return self.run_overhead + sum(self._steps(policy, num_steps, self.step_overhead))

    def predict_transformer(self, policy: BlockPolicy, num_steps: int) -> float:
        """Seconds of that run in the forwards of the transformer alone."""
        return sum(self._steps(policy, num_steps, max(0.0, self.step_overhead - self.step_outside)))

    def _steps(self, policy: BlockPolicy, num_steps: int, overhead: float) -> Iterator[float]:
        """Seconds of each call of the transformer, `overhead` of them beside its blocks."""
        branches: tuple[Branch, ...] = ("both",)
        if ARCHITECTURES[policy.model.transformer].guidance == "calls":
            branches = ("cond", "uncond") if self.calls_per_step == 2 else ("cond",)
        for branch in branches:
            plan = Plan.compile(policy, num_steps, branch=branch)
            for row, work, guided in zip(plan.steps, plan.work, plan.guided, strict=True):
                scaled = (
                    costs[index]
                    for index, block in enumerate(row)
                    for operand, costs in self.block_scaled.items()
                    if any(action.operand == operand for _, action in block.scales)
                )
                # a forecast reads and writes once more what the reuse does
                forecast = (self.block_reuse[i] for i, b in enumerate(row) if b.forecast and work[i] == "reuse")
                step = self.predict([work]) - self.run_overhead + sum(scaled) + sum(forecast)
                step += overhead - self.step_overhead if work else 0.0  # one that is passed over has none
                yield step if guided or branch != "both" else self.unguided * step

    def predict(self, kinds: Sequence[Sequence[str]]) -> float:
        """Seconds of a run in which block `b` in call `i` does `kinds[i][b]`: "compute", "skip" or "reuse".

        `kinds` has a row per call, as `Plan.work`, empty where a run that starts late passes it over. With all
        computed at the measured number of steps the answer is `run_seconds`. Raises ValueError for another number of
        blocks or another kind.
        """
        skip = (self.block_skip,) * len(self.block_compute)
        costs = {"compute": self.block_compute, "reuse": self.block_reuse, "skip": skip}
        seconds = self.run_overhead
        for step, row in enumerate(kinds):
            if not row:
                continue
            if len(row) != len(self.block_compute):
                raise ValueError(f"kinds[{step}] has {len(row)} blocks; accepted: {len(self.block_compute)}")
            seconds += self.step_overhead
            for block, kind in enumerate(row):
                if kind not in costs:
                    raise ValueError(f"kinds[{step}][{block}] is {kind!r}; accepted: {', '.join(costs)}")
                seconds += costs[kind][block]
        return seconds


@dataclass(frozen=True)
class Latency:
    """Seconds of a generation: all of it, and in the forwards of its transformer."""

    pipeline: float
    transformer: float


def time_runs(run: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median seconds of `run()` after `warmup` untimed calls.

    By events of the current CUDA device where that is in use, synchronised before and after, else by the clock.
    """
    return statistics.median(_timed(run, repeats, warmup))


def time_pipeline(pipe: Any, run: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> Latency:
    """Median seconds of `run()`, as `time_runs`, and of the forwards of `pipe.transformer` in it, summed per run.

    Forward hooks mark where these begin and end, and are gone afterwards; nothing is synchronised in between. A
    transformer that was compiled with `Module.compile` would be compiled anew for them.
    """
    forwards: list[list[Any]] = []

    def marked() -> None:
        forwards.append([])
        run()

    def mark(*_: Any) -> None:
        forwards[-1].append(_mark(torch.cuda.is_initialized()))

    with ExitStack() as hooks:
        hooks.enter_context(pipe.transformer.register_forward_pre_hook(mark))
        hooks.enter_context(pipe.transformer.register_forward_hook(mark))
        pipeline = _timed(marked, repeats, warmup)
    inside = [sum(_seconds(a, b) for a, b in zip(m[::2], m[1::2], strict=True)) for m in forwards[warmup:]]
    return Latency(statistics.median(pipeline), statistics.median(inside))


def speedup(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times faster: the median over turns of the ratio of two times taken in the same turn, in seconds.

    A machine that is slow for a while, as a shared one is, slows both alike; the medians of each may be of different
    whiles. Raises ValueError where one has more turns than the other.
    """
    return statistics.median(b / a for b, a in zip(before, after, strict=True))


def _timed(run: Callable[[], Any], repeats: int, warmup: int) -> list[float]:
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; accepted: 1 or more")
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        cuda = torch.cuda.is_initialized()
        _synchronize()
        start = _mark(cuda)
        run()
        end = _mark(cuda)
        _synchronize()
        seconds.append(_seconds(start, end))
    return seconds


def _mark(cuda: bool) -> Any:
    """Now: on the time line of the CUDA device, which the host does not wait for, or by the clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    """Between two marks; those of a CUDA device must have been reached."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def measure_cost_table(
    pipe: Any, call: Callable[[], Any], repeats: int = 5, operands: Sequence[Operand] = (), unguided: bool = False
) -> CostTable:
    """Measure `pipe`, unmodified, by `repeats` runs of `call()` after an untimed one.

    `call` makes one whole generation with fixed prompts and steps and returns the pipeline's output, or its images.
    For each of `operands`, but for `input`, which is free, one run more with text scaled in every block. With
    `unguided` one more without guidance, if that is one call of both halves. Each of these is held against the run just
    before it, for a machine may be slower for a while.
    Forward hooks time the blocks and the transformer and are gone afterwards. The device should do nothing else.
    Raises ValueError for a compiled transformer, for any device but CPU and CUDA, when a block does not run once in
    each step, and when runs differ in their number of steps.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; accepted: 1 or more")
    transformer, architecture = resolve(pipe)
    blocks = [slot.block for slot in block_slots(transformer, architecture)]
    if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in (pipe.transformer, *blocks)):
        raise ValueError("pipe has a compiled transformer, which timing hooks would recompile; accepted: an eager one")
    outputs, images = _survey(blocks, call)
    hidden = outputs[0][0]
    if hidden.device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {hidden.device}; accepted: cpu or cuda, where time can be read")
    cuda = hidden.device.type == "cuda"
    with torch.cuda.device(hidden.device) if cuda else nullcontext():
        timed = partial(_time_run, pipe.transformer, blocks, call, cuda)
        costly: list[Operand] = [o for o in operands if o != "input"]
        runs: list[_Run] = []
        scaling: dict[str, tuple[float, ...]] = {}
        for turn in range(repeats):
            runs.append(timed())
            for operand in costly[turn::repeats]:
                scaling[operand] = _scaling(pipe, operand, runs[-1], timed)
        halves = unguided and architecture.guidance == "batched" and hidden.shape[0] == 2 * images.shape[0]
        remains = _unguided_share(pipe, runs[-1], timed) if halves else 1.0
        reuse = _time_reuse(outputs, repeats)
    steps = {run.steps for run in runs}
    if len(steps) != 1:
        raise ValueError(f"call ran {sorted(steps)} steps in different repeats; accepted: the same number every time")
    (count,) = steps
    run_seconds = statistics.median(run.seconds for run in runs)
    loop = statistics.median(run.loop for run in runs)
    compute = [statistics.median(s for run in runs for s in run.blocks[b]) for b in range(len(blocks))]
    # noise can lift the sum of medians over the median loop: the blocks then are all there is to a step
    fit = min(1.0, loop / count / sum(compute))
    compute = [seconds * fit for seconds in compute]
    scheduler = getattr(pipe, "scheduler", None)
    return CostTable(
        calls_per_step=1 if scheduler is None else max(1, count // len(scheduler.timesteps)),
        block_compute=tuple(compute),
        block_reuse=tuple(reuse),
        block_scaled=scaling,
        unguided=remains,
        step_overhead=max(0.0, loop / count - sum(compute)),
        step_outside=max(0.0, loop - statistics.median(run.transformer for run in runs)) / count,
        run_overhead=max(0.0, run_seconds - loop),
        run_seconds=run_seconds,
        steps=count,
        repeats=repeats,
        batch=images.shape[0],
        rows=hidden.shape[0],
        height=images.shape[1],
        width=images.shape[2],
        device=_device_name(hidden.device),
        dtype=str(hidden.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True)
class _Output:
    """Form of one tensor that a block gives back: shape `(rows, tokens, dim)`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Run:
    """Seconds of one run: whole, in the denoising loop, and per block and step."""

    seconds: float
    loop: float
    transformer: float  # of that, in its forwards
    later: float  # in the loop, from the second step on
    steps: int
    blocks: list[list[float]]


def _survey(blocks: list[torch.nn.Module], call: Callable[[], Any]) -> tuple[list[tuple[_Output, ...]], np.ndarray]:
    """One untimed run: what each block gives back, and the images `(n, h, w, 3)`."""
    outputs: dict[int, tuple[_Output, ...]] = {}

    def keep(index: int):
        def hook(module, args, output):
            tensors = output if isinstance(output, tuple) else (output,)
            kept = (t for t in tensors if isinstance(t, torch.Tensor))  # the last block gives no text back
            outputs[index] = tuple(_Output(tuple(t.shape), t.dtype, t.device) for t in kept)

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(keep(index)))
        result = call()
    missing = [index for index in range(len(blocks)) if not outputs.get(index)]
    if missing:
        raise ValueError(f"blocks {missing} did not run in call; accepted: a run of the pipeline without a policy")
    images = as_array(getattr(result, "images", result))
    if not len(images):
        raise ValueError("call returned no images; accepted: the pipeline's output, or its images")
    return [outputs[index] for index in range(len(blocks))], images


def _time_run(transformer: torch.nn.Module, blocks: list[torch.nn.Module], call: Callable[[], Any], cuda: bool) -> _Run:
    marks: list[list[Any]] = [[] for _ in range(len(blocks) + 1)]  # start, end, start, end …; the transformer's last

    def mark(index: int):
        def hook(*_):
            marks[index].append(_mark(cuda))

        return hook

    with ExitStack() as hooks:
        for index, module in enumerate([*blocks, transformer]):
            hooks.enter_context(module.register_forward_pre_hook(mark(index)))
            hooks.enter_context(module.register_forward_hook(mark(index)))
        _synchronize()
        start = _mark(cuda)
        call()
        end = _mark(cuda)
        _synchronize()
        whole = _seconds(start, end)
    *of_blocks, of_transformer = marks
    steps = len(of_transformer) // 2
    for index, of_block in enumerate(of_blocks):
        if len(of_block) != 2 * steps:
            raise ValueError(f"block {index} ran {len(of_block) // 2} times in {steps} steps; accepted: once in each")
    return _Run(
        seconds=whole,
        loop=min(whole, _seconds(of_transformer[0], of_transformer[-1])),
        transformer=sum(_seconds(a, b) for a, b in zip(of_transformer[::2], of_transformer[1::2], strict=True)),
        later=_seconds(of_transformer[2], of_transformer[-1]) if steps > 1 else 0.0,
        steps=steps,
        blocks=[[_seconds(a, b) for a, b in zip(m[::2], m[1::2], strict=True)] for m in of_blocks],
    )


def _scaling(pipe: Any, operand: Operand, plain: _Run, timed: Callable[[], _Run]) -> tuple[float, ...]:
    """Seconds that scaled text adds to each block's forward, medians over the steps of a run and of the `plain` one."""
    louder = ScaleText(operand=operand, scale=1.1)
    everywhere = Rule(blocks=tuple(range(len(plain.blocks))), action=louder)
    policy = BlockPolicy.for_model(pipe, f"{operand} scaled", [everywhere])
    with apply_policy(pipe, policy):
        scaled = timed()
    pairs = zip(scaled.blocks, plain.blocks, strict=True)
    return tuple(max(0.0, statistics.median(after) - statistics.median(before)) for after, before in pairs)


def _unguided_share(pipe: Any, guided: _Run, timed: Callable[[], _Run]) -> float:
    """What a run in which guidance acts at the first step alone takes afterwards, as a share of a guided run."""
    if guided.later == 0:
        return 1.0
    policy = BlockPolicy.for_model(pipe, "unguided", [], guidance_window=(0.0, 0.5 / guided.steps))
    with apply_policy(pipe, policy):
        return min(1.0, timed().later / guided.later)


def _time_reuse(outputs: list[tuple[_Output, ...]], repeats: int) -> list[float]:
    """Seconds to add a residual to each output of each block; blocks of equal outputs share one measurement."""
    costs: dict[tuple[_Output, ...], float] = {}
    for output in outputs:
        if output not in costs:
            # ones, not zeros: untouched zero pages would be read faster than real memory
            tensors = [torch.ones(o.shape, dtype=o.dtype, device=o.device) for o in output for _ in range(2)]
            pairs = list(zip(tensors[::2], tensors[1::2], strict=True))

            def add(pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs):
                for _ in range(_ADDITIONS):
                    for stream, residual in pairs:
                        torch.add(stream, residual)

            costs[output] = time_runs(add, repeats) / _ADDITIONS
    return [costs[output] for output in outputs]


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty or the bare architecture there
    lines = table.read_text().splitlines() if table.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
