"""Policies that others wrote down in a form of their own: ECAD's schedules, TexTailor's controllers, masks over steps.

Each function gives the fields of a `BlockPolicy` beside its model. What they mean is `docs/formats.md`; what a policy
cannot say is refused by name, never approximated unasked.
"""

from collections.abc import Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, NonNegativeInt, PositiveInt, StrictBool, ValidationError

from .error import PolicyError, refusal, short
from .json_file import json_of
from .policy import Reuse, Rule, ScaleText, Skip

Partial: TypeAlias = Literal["refuse", "compute"]
Way: TypeAlias = Literal["strengthen", "empty", "remove"]

# What ECAD recomputes or reuses on its own inside a block: double-stream and single-stream ones.
_DOUBLE = ("full_attn", "full_ff", "full_ff_context")
_SINGLE = ("single_attn", "single_proj_mlp", "single_proj_out")


class EcadSchedule(BaseModel):
    """The part of an ECAD file that says what to do."""

    name: str
    num_inference_steps: PositiveInt
    num_blocks: NonNegativeInt
    num_single_blocks: NonNegativeInt = 0
    schedule: dict[str, dict[str, dict[str, StrictBool]]]  # step -> block -> component -> whether it is recomputed


class EcadFile(BaseModel):
    """A whole file: the schedule, the sampling it is for, and what ECAD measured."""

    cache_schedule: EcadSchedule
    config: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


def ecad(path: str | PathLike[str], num_blocks: int, partial: Partial) -> dict[str, Any]:
    """The schedule in an ECAD file (arXiv 2506.15682): a block that recomputes nothing at a step reuses there.

    A block that recomputes some components and reuses others is refused, or with `partial="compute"` computes.
    """
    if partial not in ("refuse", "compute"):
        raise PolicyError(f"partial is {partial!r}; it must be 'refuse' or 'compute'.")
    with json_of(path) as data:
        try:
            file = EcadFile.model_validate(data)
        except ValidationError as error:
            raise refusal(error, EcadFile, {"cache_schedule": EcadSchedule}) from None
        schedule = file.cache_schedule
        if schedule.num_blocks + schedule.num_single_blocks != num_blocks:
            found = f"{schedule.num_blocks} double-stream and {schedule.num_single_blocks} single-stream blocks"
            raise PolicyError(f"cache_schedule is for {found}; the model here has {num_blocks}.")
        if len(schedule.schedule) != schedule.num_inference_steps:
            told = f"cache_schedule.num_inference_steps is {schedule.num_inference_steps}"
            raise PolicyError(f"{told}; its schedule has {len(schedule.schedule)} steps.")
        computed, rounded = _ecad_computes(schedule, partial)
        source = {
            "format": "ECAD schedule, arXiv 2506.15682",
            "file": Path(path).name,
            "partly_recomputed_block_calls": rounded,
            "their_metrics": file.metrics,
        }
        return {
            "name": schedule.name,
            "rules": reuse_elsewhere(computed),
            "tuned_for": file.config | {"num_inference_steps": schedule.num_inference_steps},
            "evidence": {"source": source},
        }


def _ecad_computes(schedule: EcadSchedule, partial: Partial) -> tuple[list[list[bool]], int]:
    """Steps x blocks of whether a block computes, and how many of these block calls ECAD recomputes only in part."""
    components = {str(i): _DOUBLE for i in range(schedule.num_blocks)}
    components |= {f"single_{i}": _SINGLE for i in range(schedule.num_single_blocks)}
    steps = [f"{i:03}" for i in range(schedule.num_inference_steps)]
    computed: list[list[bool]] = []
    rounded = 0
    _refuse_other_keys("cache_schedule.schedule", schedule.schedule, steps)
    for step in steps:
        blocks = schedule.schedule[step]
        _refuse_other_keys(f"Step {step}", blocks, list(components))
        for block, known in components.items():
            _refuse_other_keys(f"Step {step}, block {block}", blocks[block], known)
            fresh = [name for name in known if blocks[block][name]]
            stale = [name for name in known if not blocks[block][name]]
            if fresh and stale:
                rounded += 1
                if partial == "refuse":
                    raise PolicyError(
                        f"Step {step}, block {block} recomputes {', '.join(fresh)} and reuses {', '.join(stale)}; here "
                        "a block does either as a whole, so pass partial='compute' to have it compute."
                    )
            if step == steps[0] and not fresh:
                raise PolicyError(f"Step {step}, block {block} recomputes nothing; there is nothing to reuse yet.")
        computed.append([any(blocks[block].values()) for block in components])
    return computed, rounded


def _refuse_other_keys(where: str, found: dict[str, Any], wanted: Sequence[str]) -> None:
    known = ", ".join(wanted) if len(wanted) <= 3 else f"{wanted[0]} to {wanted[-1]}"
    for key in found:
        if key not in wanted:
            raise PolicyError(f"{where} has {short(key)}; known are {known}.")
    for key in wanted:
        if key not in found:
            raise PolicyError(f"{where} lacks {key}; it must have {known}.")


def textailor(
    num_blocks: int, layers: Sequence[int], scale: float | Sequence[float] | None, way: Way
) -> dict[str, Any]:
    """What TexTailor (arXiv 2601.02211) does to blocks, at all steps and in both halves of guidance.

    `strengthen` multiplies the running text stream in front of each layer by `scale` (one number, or one per layer),
    `empty` by 0; `remove` skips the layers.
    """
    if way not in ("strengthen", "empty", "remove"):
        raise PolicyError(f"way is {way!r}; it must be 'strengthen', 'empty' or 'remove'.")
    if not layers or any(layer not in range(num_blocks) for layer in layers):
        raise PolicyError(f"layers is {short(list(layers))}; it must name blocks of this model, 0 to {num_blocks - 1}.")
    if way != "strengthen" and scale is not None:
        raise PolicyError(f"scale is {short(scale)}; {way!r} takes none.")
    if way == "remove":
        rules = [Rule(blocks=tuple(layers), action=Skip())]
    else:
        if way == "empty":
            scale = 0.0
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(layers)
        if scale is None or len(scales) != len(layers):
            raise PolicyError(f"scale is {short(scale)}; 'strengthen' takes a number, or one for each of the layers.")
        layers_of: dict[Any, list[int]] = {}
        for layer, factor in zip(layers, scales, strict=True):
            layers_of.setdefault(factor, []).append(layer)
        rules = [
            Rule(blocks=tuple(blocks), action=ScaleText(operand="input", scale=factor))
            for factor, blocks in layers_of.items()
        ]
    source = {"format": "TexTailor controller, arXiv 2601.02211", "way": way, "layers": list(layers), "scale": scale}
    return {"name": f"TexTailor {way}", "rules": tuple(rules), "evidence": {"source": source}}


def step_mask(num_blocks: int, mask: Sequence[bool] | Sequence[int]) -> dict[str, Any]:
    """The whole transformer computes at the steps where `mask` is 1, and each block reuses at the others."""
    for step, value in enumerate(mask):
        if value not in (0, 1):
            raise PolicyError(f"mask[{step}] is {short(value)}; it must be 1 to compute that step or 0 to reuse.")
    if not any(mask[:1]):
        raise PolicyError(
            f"mask is {short(list(mask))}; it must begin with 1, for the first step has nothing to reuse."
        )
    computed = [bool(value) for value in mask]
    return {
        "name": f"{sum(computed)} of {len(computed)} steps",
        "rules": reuse_elsewhere([[value] * num_blocks for value in computed]),
        "tuned_for": {"num_inference_steps": len(computed)},
        "evidence": {"source": {"format": "step mask", "mask": [int(value) for value in computed]}},
    }


def reuse_elsewhere(computed: list[list[bool]]) -> tuple[Rule, ...]:
    """Rules under which, in a run of `len(computed)` steps, block b computes where `computed[step][b]` and else reuses.

    One rule for all blocks that reuse from step i up to step j: the window [i/T, j/T) holds these steps and no other,
    since rounding keeps quotients of different whole numbers by one T in their order.
    """
    num_steps = len(computed)
    blocks_of: dict[tuple[int, int], list[int]] = {}
    for block, column in enumerate(zip(*computed, strict=True)):
        start = 0
        for computes, steps in groupby(column):
            end = start + len(list(steps))
            if not computes:
                blocks_of.setdefault((start, end), []).append(block)
            start = end
    return tuple(
        Rule(blocks=tuple(blocks), window=(start / num_steps, end / num_steps), action=Reuse())
        for (start, end), blocks in sorted(blocks_of.items())
    )
