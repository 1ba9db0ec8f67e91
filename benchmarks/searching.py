"""A search in one process, for benchmarks: space, anchors, samplers and race of `blocktune search` on a workbench."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import optuna
from blocktune.search.config import Search
from blocktune.search.front import Point, chance_to_hold, non_dominated, shortlist
from blocktune.search.prior import prior
from blocktune.search.racing import Race, rounds
from blocktune.search.space import Around, anchors, candidate, distributions, steps_of, suggest
from blocktune.search.study import given, join_population, new_sampler
from optuna.trial import TrialState

from .workbench import Way, Workbench


@dataclass(frozen=True)
class Proposal:
    """What a sampler proposed, as measured: by all pictures, or by the first of them where the race dropped it."""

    way: Way
    point: Point
    gains: np.ndarray  # (pictures seen, 2) of alignment and quality over the unmodified model, in shares of 100 points
    new: bool  # not proposed before


def proposals(bench: Workbench, search: Search, pictures: int, first: int | None = None) -> Iterator[Proposal]:
    """Without end what a search of such a sampler, seed and refinement proposes, measured on so many search prompts.

    With `first` candidates race as in `blocktune search`, from so many pictures on. The anchors that lie in the space
    and what a search tries next come first, and latency is predicted, as in any search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = bench.config.model_copy(update={"search": search})
    space, costs = distributions(config, bench.model.num_blocks), bench.costs()
    study = optuna.create_study(
        directions=["maximize", "maximize", "minimize"], sampler=new_sampler(config, search.seed)
    )
    known = [p for p in anchors(config, bench.model.num_blocks).values() if p["steps"] in steps_of(config)]
    known += prior(config, bench.model).values()
    for params in known:
        study.enqueue_trial({name: value for name, value in params.items() if name in space})
    plain = bench.baseline(costs.run_seconds, "search", pictures)
    before = bench.matrix(Way("unmodified", "unmodified", bench.steps), "search", pictures)
    race, seen = Race(pictures, costs.run_seconds), dict[str, Proposal]()
    around = Around(config, bench.model)
    rng, whole = np.random.default_rng(search.seed), list[tuple[dict[str, Any], Point]]()  # those with all pictures
    while True:
        beside = None
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and rng.random() < search.refine:
            front = non_dominated(point for _, point in whole)
            members = [params for params, point in whole if point in front]
            beside = around.near(members, seen, rng)
        with given(study, beside):
            trial = study.ask()
            params = suggest(trial, space)
        join_population(study, trial)
        chosen = candidate(params, config, bench.model, f"trial {trial.number}")
        new = chosen.behaviour not in seen
        if new:
            way = Way("blocktune", f"trial {trial.number}", chosen.steps, chosen.policy)
            latency = costs.predict_policy(chosen.policy, chosen.steps)
            gains = np.empty((0, 2))
            for count in rounds(first if first and trial.number >= len(known) else pictures, pictures):
                gains = (bench.matrix(way, "search", count) - before[:count]) / plain.scales
                if count < pictures and not race.goes_on(gains, latency):
                    break
            alignment, quality = (plain.alignment, plain.quality) + gains.mean(axis=0) * plain.scales
            point = Point(way.name, float(alignment), float(quality), latency, way.key, way.steps)
            if len(gains) == pictures:
                race.finish(gains, latency)
                whole.append((params, point))
            seen[chosen.behaviour] = Proposal(way, point, gains, True)
        proposal = replace(seen[chosen.behaviour], new=new)
        study.tell(trial, [proposal.point.alignment, proposal.point.quality, proposal.point.latency])
        yield proposal


def searched(bench: Workbench, search: Search, budget: int, pictures: int, first: int, count: int) -> list[Way]:
    """Those of a raced search's candidates that it would confirm, by estimates lowered by their standard error.

    It ends when `budget` pictures are drawn, or when a thousand proposals bring no more.
    """
    baseline = bench.baseline(bench.costs().run_seconds, "search", pictures)
    ways: dict[str, Way] = {}
    points: list[Point] = []
    chances: dict[str, float] = {}
    drawn = 0
    texts, held_out = [p.text for p in bench.prompts["search"][:pictures]], len(bench.prompts["confirm"])
    margins = bench.config.confirm.margin, bench.config.confirm.quality_margin
    for proposal in islice(proposals(bench, search, pictures, first), 1000):
        drawn += len(proposal.gains) * proposal.new
        if proposal.new and len(proposal.gains) == pictures:
            key = proposal.point.key
            points.append(baseline.cautious(proposal.point, proposal.gains))
            ways[key] = proposal.way
            chances[key] = chance_to_hold(proposal.gains, texts, held_out, count, margins)
        if drawn >= budget:
            break
    bench.say(f"searched {drawn} pictures: {len(points)} candidates with all {pictures}")
    return [ways[p.key] for p in shortlist(points, baseline, count, chances)]
