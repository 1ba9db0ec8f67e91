"""Peers that search before they run, rewritten small on this project's policies.

BudCache's annealed step masks, ECAD's evolution of what each block reuses, and TexTailor's louder text at blocks that a
probe chose, with random sets of as many blocks as its control.
"""

import json

import numpy as np
from blocktune.policies import BlockPolicy, Rule, ScaleText
from blocktune.policies.formats import reuse_elsewhere

from ..workbench import Way, Workbench


def step_mask(bench: Workbench, computed: int, rounds: int, pictures: int) -> Way:
    """The steps to compute, of a fixed number, by annealing and then climbing as BudCache does.

    Its cost is the squared distance of a few pictures to those of the unmodified model (BudCache: of their latents);
    one computed step moves at a time, mostly by up to three. Step 0 is always computed.
    """
    path = bench.out / f"step_mask-{computed}.json"
    steps = bench.steps
    if not path.exists():
        rng = np.random.default_rng(computed)
        full = bench.pictures(Way("unmodified", "", steps), "search", pictures) / 255
        costs: dict[tuple[int, ...], float] = {}

        def cost(at: tuple[int, ...]) -> float:
            if at not in costs:
                costs[at] = float(((bench.pictures(_masked(bench, at), "search", pictures) / 255 - full) ** 2).mean())
            return costs[at]

        def moved(at: tuple[int, ...], which: int, to: int) -> tuple[int, ...] | None:
            free = 0 < to < steps and to not in at
            return tuple(sorted({*at} - {at[which]} | {to})) if free else None

        now = best = tuple(int(step) for step in np.linspace(0, steps, computed, endpoint=False))
        first = cost(now) or 1.0
        for number in range(rounds):
            temperature = 0.05 * (1e-5 / 0.05) ** (number / rounds)  # of the first mask's cost
            which = int(rng.integers(1, computed))
            near = int(now[which] + rng.integers(-3, 4))
            tried = moved(now, which, near if rng.random() < 0.7 else int(rng.integers(1, steps)))
            if tried and rng.random() < np.exp(min(0.0, (cost(now) - cost(tried)) / first / temperature)):
                now = tried
            best = min(best, now, key=cost)
        for _ in range(20):
            around = [m for w in range(1, computed) for d in (-1, 1) if (m := moved(best, w, best[w] + d))]
            if not around or cost(min(around, key=cost)) >= cost(best):
                break
            best = min(around, key=cost)
        bench.write(path.name, best)
        bench.say(f"BudCache, {computed} of {steps} steps: {list(best)}, {len(costs)} masks tried")
    return _masked(bench, tuple(json.loads(path.read_text())))


def _masked(bench: Workbench, at: tuple[int, ...]) -> Way:
    mask = [int(step in at) for step in range(bench.steps)]
    return Way("BudCache", f"{len(at)} steps", bench.steps, BlockPolicy.from_step_mask(bench.model, mask))


def evolved(bench: Workbench, candidates: int, pictures: int, population: int = 24) -> list[Way]:
    """The front of NSGA-II over one bit per step and block, compute or reuse, with ECAD's operators.

    Crossover at four points with probability 0.9, bits flipped with probability 0.05, alignment against predicted
    seconds (ECAD: ImageReward against MACs), begun from regular schedules and random ones.
    """
    rng, costs = np.random.default_rng(0), bench.costs()
    shape = bench.steps, bench.model.num_blocks
    members: dict[bytes, tuple[Way, np.ndarray, tuple[float, float]]] = {}

    def measure(bits: np.ndarray) -> bytes:
        bits[0] = True  # the first step has nothing to reuse
        key = bits.tobytes()
        if key not in members:
            policy = BlockPolicy(name="ECAD", model=bench.model, rules=reuse_elsewhere(bits.tolist()))
            way = Way("ECAD", f"candidate {len(members)}", bench.steps, policy)
            seconds = costs.predict_policy(policy, bench.steps)
            alignment = bench.scores(way, "search", pictures)[bench.objectives[0]].mean()
            members[key] = way, bits, (-float(alignment), seconds)
        return key

    def ranked(keys: list[bytes]) -> list[bytes]:
        """Front after front, within each the least crowded first."""
        order: list[bytes] = []
        rest = list(dict.fromkeys(keys))
        while rest:
            losses = np.array([members[key][2] for key in rest])
            beaten = [bool(((losses <= one).all(1) & (losses < one).any(1)).any()) for one in losses]
            front = [i for i, worse in enumerate(beaten) if not worse]
            crowding = np.zeros(len(front))
            for axis in range(2):
                along = np.argsort(losses[front, axis], kind="stable")
                values = losses[front, axis][along]
                gaps = np.full(len(front), np.inf)
                gaps[1:-1] = (values[2:] - values[:-2]) / (np.ptp(values) or 1.0)
                crowding[along] += gaps
            order += [rest[front[i]] for i in np.argsort(-crowding, kind="stable")]
            rest = [key for key, worse in zip(rest, beaten, strict=True) if worse]
        return order

    regular = [np.repeat([[step % every == 0] for step in range(shape[0])], shape[1], axis=1) for every in (1, 2, 3, 4)]
    random = [rng.random(shape) < rng.uniform(0.3, 0.9) for _ in range(population - len(regular))]
    living = ranked([measure(bits.copy()) for bits in [*regular, *random][:candidates]])
    while len(members) < candidates:
        children = []
        for _ in range(population):
            # the better of two, as they are in order of rank
            mother, father = (members[living[int(min(rng.integers(0, len(living), 2)))]][1] for _ in range(2))
            child = mother.ravel().copy()
            if rng.random() < 0.9:
                cuts = sorted(rng.choice(np.arange(1, child.size), 4, replace=False))
                for a, b in ((cuts[0], cuts[1]), (cuts[2], cuts[3])):
                    child[a:b] = father.ravel()[a:b]
            child ^= rng.random(child.size) < 0.05
            if len(members) < candidates:
                children.append(measure(child.reshape(shape)))
        living = ranked([*living, *children])[:population]
        bench.say(f"ECAD's operators: {len(members)} of {candidates} candidates")
    front = [members[key] for key in living]
    front = [
        m
        for m in front
        if not any(all(a <= b for a, b in zip(o[2], m[2], strict=True)) and o[2] != m[2] for o in front)
    ]
    front.sort(key=lambda m: m[2][1])
    chosen = sorted({round(i) for i in np.linspace(0, len(front) - 1, 8)})
    return [front[i][0] for i in chosen]


def louder(bench: Workbench, operand: str, pictures: int, random_sets: int, size: int = 3) -> list[Way]:
    """Louder text at the blocks that a probe chose, at three scales, and at random sets of as many blocks at one."""
    blocks = bench.model.num_blocks

    def way(method: str, name: str, at: tuple[int, ...], scale: float) -> Way:
        rule = Rule(blocks=at, action=ScaleText.model_validate({"operand": operand, "scale": scale}))
        return Way(method, f"{operand} {name}", bench.steps, BlockPolicy(name=name, model=bench.model, rules=(rule,)))

    alone = [bench.scores(way("probe", f"block {b}", (b,), 1.5), "search", pictures) for b in range(blocks)]
    means = [float(scores[bench.objectives[0]].mean()) for scores in alone]
    best = tuple(sorted(int(b) for b in np.argsort(means)[-size:]))
    rng = np.random.default_rng(0)
    drawn = [tuple(sorted(int(b) for b in rng.choice(blocks, size, replace=False))) for _ in range(random_sets)]
    chosen = [way("TexTailor", f"x{scale:g} at {list(best)}", best, scale) for scale in (1.25, 1.5, 2.0)]
    return chosen + [way("random sets", f"x1.5 at {list(at)}", at, 1.5) for at in dict.fromkeys(drawn)]
