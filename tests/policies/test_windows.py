"""Windows by the scheduler's own index, for every family: its transformer in a loop that the scheduler drives.

The same loops are written out as formulas, over a transformer whose blocks are changed by hand.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, Reuse, Rule, Skip, apply_policy
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn

from .by_hand import forward_as, identity, keeping_residuals
from .families import FAMILIES, Family, stacked

Velocity = Callable[[torch.Tensor], torch.Tensor]
LEVELS = [1.0, 0.75, 0.5, 0.25, 0.0]  # of noise, in a run of four steps


def velocity(model: nn.Module, family: Family) -> Velocity:
    """Latents, of the shape of the output, to the output; text and time are others at each call."""
    calls = iter(range(99))

    def call(latents: torch.Tensor) -> torch.Tensor:
        inputs = family.inputs(batch=1, seed=next(calls))
        name = "x" if "x" in inputs else "hidden_states"
        given = torch.stack(inputs[name]) if name == "x" else inputs[name]
        given[tuple(map(slice, latents.shape))] = latents  # behind them FLUX.1 Fill has its mask
        inputs[name] = list(given) if name == "x" else given
        with torch.no_grad():
            return stacked(model(**inputs))

    return call


# --- by the scheduler, and written out ---------------------------------------------------------------------------


def driven(scheduler: Any, of: Velocity, latents: torch.Tensor, start: int = 0, **schedule: Any) -> torch.Tensor:
    """As a pipeline does it; `start` is the step that the strength of image-to-image leaves to begin with."""
    scheduler.set_timesteps(**schedule)
    scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        (latents,) = scheduler.step(of(latents), t, latents, return_dict=False)
    return latents


def euler(levels: list[float], of: Velocity, latents: torch.Tensor) -> torch.Tensor:
    for now, then in pairwise(levels):
        latents = latents + (then - now) * of(latents)
    return latents


def heun(levels: list[float], of: Velocity, latents: torch.Tensor) -> torch.Tensor:
    """Two evaluations a step, but one at the last."""
    for now, then in pairwise(levels[:-1]):
        here = of(latents)
        there = of(latents + (then - now) * here)
        latents = latents + (then - now) * (here + there) / 2
    return euler(levels[-2:], of, latents)


EULER = FlowMatchEulerDiscreteScheduler
RUNS: dict[str, tuple[Any, dict[str, Any], Velocity, str, str]] = {
    # scheduler, its schedule, the loop, and at each call what a block of the window [0.5, 1) does, and one that
    # computes at every second
    "four steps": (EULER(), {"sigmas": LEVELS[:-1]}, lambda *a: euler(LEVELS, *a), "ccss", "crcr"),
    "image to image": (EULER(), {"sigmas": LEVELS[:-1], "start": 1}, lambda *a: euler(LEVELS[1:], *a), "css", "crc"),
    "shortened": (EULER(), {"sigmas": [1.0, 0.6, 0.2]}, lambda *a: euler([1, 0.6, 0.2, 0], *a), "ccs", "crc"),
    "heun": (
        FlowMatchHeunDiscreteScheduler(), {"num_inference_steps": 3},
        lambda *a: heun([1, 0.5005, 0.001, 0], *a), "cccss", "crcrc",
    ),
}  # fmt: skip
ACTIONS = {"c": "compute", "r": "reuse", "s": "skip"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name, scope="module")
def test_windows_follow_the_schedulers_index(family, model):
    last = len(family.slots) - 1
    rules = [Rule(blocks=[1], window=(0.5, 1), action=Skip()), Rule(blocks=[last], action=Reuse(every=2))]
    policy = BlockPolicy.for_model(model, "test", rules)
    for name, (scheduler, schedule, loop, skips, reuses) in RUNS.items():
        latents = torch.zeros_like(family.forward(model, batch=1)) + 0.1
        with apply_policy(model, policy, scheduler=scheduler) as applied:
            for _ in range(2 if name == "four steps" else 1):
                got = driven(scheduler, velocity(model, family), latents, **schedule)
        told = [(call.step, call.blocks[1], call.blocks[last]) for call in applied.report.calls]
        start = schedule.get("start", 0)
        assert told == [(start + i, ACTIONS[s], ACTIONS[r]) for i, (s, r) in enumerate(zip(skips, reuses, strict=True))]

        skipped, reused = family.block(model, 1), family.block(model, last)
        computes, leaves_out, calls = skipped.forward, identity(skipped, family.slots[1][0]), iter(skips)
        with ExitStack() as stack:
            kept = keeping_residuals(reused, family.slots[last][0], [ACTIONS[kind] for kind in reuses])
            stack.enter_context(forward_as(reused, kept))
            by_hand = lambda *a, **k: (leaves_out if next(calls) == "s" else computes)(*a, **k)  # noqa: B023, E731
            stack.enter_context(forward_as(skipped, by_hand))
            expected = loop(velocity(model, family), latents)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # schedulers compute in float32
        assert not torch.allclose(got, loop(velocity(model, family), latents), atol=1e-2)
