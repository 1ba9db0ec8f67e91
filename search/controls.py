"""Controls of a probe: is what it found more than what any blocks would have given?

The best blocks of an effect together, on held-out prompts, beside random sets of as many and beside all blocks at the
same budget: a saving effect against fewer steps, which spare as many block calls, and text at a scale that all share.
A last control must change nothing: text made louder in front of the last block.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..policies.plan import Plan
from ..policies.policy import WHOLE_RUN, ModelIdentity
from .config import Config
from .config import Probe as ProbeConfig
from .part import EFFECTS, Case, Part

# Effects of which one is controlled, the best; those that act on all later blocks are none, for together the first of
# a set would stand for the others.
TOGETHER = (("remove",), ("reuse",), ("disable locally",), ("enhance key", "enhance value", "enhance logit"))
NO_OP = "last block, no-op"


def count(probe: ProbeConfig, images: int) -> int:
    """Pictures of all controls, where `images` are those of each."""
    return images * (1 + (2 + probe.random_sets) * sum(bool({*of} & {*probe.effects}) for of in TOGETHER))


def sets(
    config: Config, model: ModelIdentity, gains: Mapping[Case, Sequence[np.ndarray]], images: int
) -> list[tuple[str, Part]]:
    """By name what is measured on held-out prompts, after `gains` have told how far each picture of a block gained."""
    probe, blocks, found = config.probe, model.num_blocks, list[tuple[str, Part]]()
    best = {case: _best([block.mean() for block in known], probe.chosen) for case, known in gains.items()}
    sums = {case: sum(gains[case][block].mean() for block in of) for case, of in best.items()}
    rng = np.random.default_rng(config.search.seed)
    size = min(probe.chosen, blocks)
    random = [tuple(sorted(int(b) for b in rng.choice(blocks, size, replace=False))) for _ in range(probe.random_sets)]
    for alike in TOGETHER:
        cases = [case for case in gains if case[0] in alike]
        if not cases:
            continue
        effect, window = case = max(cases, key=sums.__getitem__)
        chosen = Part(effect, best[case], window, images, "confirm")
        found += [("chosen", chosen)]
        found += [(f"random {i + 1}", Part(effect, of, window, images, "confirm")) for i, of in enumerate(random)]
        found += [("all", _all(chosen, config, model))]
    # twice as loud: 1.5 times rounds in bfloat16, which alone changed a picture and its score
    last = Part("enhance input", (blocks - 1,), WHOLE_RUN, images, "confirm", 2.0)
    return [*found, (NO_OP, last)]


def _best(means: Sequence[float], count: int) -> tuple[int, ...]:
    order = np.argsort(-np.array(means), kind="stable")
    return tuple(sorted(int(b) for b in order[:count]))


def _all(chosen: Part, config: Config, model: ModelIdentity) -> Part:
    """Every block at the budget of the chosen ones: their product of scales, their silence, or their block calls."""
    blocks, scale, steps = model.num_blocks, config.probe.scale, config.generation.num_inference_steps
    every, share = tuple(range(blocks)), len(chosen.blocks) / blocks
    if chosen.effect.startswith("enhance"):
        shared = scale**share
    elif EFFECTS[chosen.effect][1] < 0:
        shared = 1 - share
    else:
        calls = Plan.compile(chosen.policy(model, scale), steps).counts()
        fewer = max(1, steps - max(1, round((calls.skipped + calls.reused) / blocks)))
        return Part(chosen.effect, every, chosen.window, chosen.images, "confirm", steps=fewer)
    return Part(chosen.effect, every, chosen.window, chosen.images, "confirm", shared)


def uncontrolled(effects: Sequence[str], controlled: Sequence[str]) -> str:
    """Which effects have no sets of blocks, and why; empty where all have."""
    told = []
    if later := [e for e in effects if not any(e in alike for alike in TOGETHER)]:
        told.append(f"{', '.join(later)} (acts on later blocks too, so that the first of a set stands for it)")
    for alike in TOGETHER:
        best = next((e for e in controlled if e in alike), None)
        if best and (others := [e for e in effects if e in alike and e != best]):
            told.append(f"{', '.join(others)} ({best} gained more)")
    return f"not taken together: {'; '.join(told)}" if told else ""
