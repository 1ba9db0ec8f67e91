"""A search in one process, for benchmarks: the space, anchors and samplers of `blocktune search` on a workbench."""

from collections.abc import Iterator
from dataclasses import replace

import optuna
from blocktune.search.config import Search
from blocktune.search.front import Point, non_dominated, spread
from blocktune.search.space import anchors, candidate, distributions, steps_of, suggest
from blocktune.search.study import new_sampler

from .workbench import Way, Workbench


def proposals(
    bench: Workbench, sampler: str, trials: int, pictures: int, seed: int = 0
) -> Iterator[tuple[Way, Point, bool]]:
    """What `sampler` proposes trial by trial, as measured on so many of the search prompts; and whether it is new.

    The anchors that lie in the space come first, as in any search; latency is predicted, as in any search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = bench.config.model_copy(update={"search": Search.model_validate({"sampler": sampler})})
    space, costs, seen = distributions(config, bench.model.num_blocks), bench.costs(), set()
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"], sampler=new_sampler(config, seed))
    for params in anchors(config, bench.model.num_blocks).values():
        if params["steps"] in steps_of(config):
            study.enqueue_trial({name: value for name, value in params.items() if name in space})
    for number in range(trials):
        trial = study.ask()
        chosen = candidate(suggest(trial, space), config, bench.model, f"trial {number}")
        way = Way("blocktune", f"trial {number}", chosen.steps, chosen.policy)
        point = bench.point(way, costs.predict_policy(chosen.policy, chosen.steps), "search", pictures)
        study.tell(trial, [point.alignment, point.quality, point.latency])
        yield way, point, chosen.key not in seen
        seen.add(chosen.key)


def searched(bench: Workbench, trials: int, pictures: int, count: int) -> list[Way]:
    """The members of a search's front that command most, by estimates lowered by their standard error."""
    plain = Way("unmodified", "unmodified", bench.steps)
    before = bench.scores(plain, "search", pictures)
    baseline = bench.baseline(bench.costs().run_seconds, "search", pictures)
    ways: dict[str, Way] = {}
    points: list[Point] = []
    for way, point, new in proposals(bench, "tpe", trials, pictures):
        if new:
            after = bench.scores(way, "search", pictures)
            alignment, quality = ((after[n] - before[n]).std(ddof=1) / pictures**0.5 for n in bench.objectives)
            points.append(replace(point, alignment=point.alignment - alignment, quality=point.quality - quality))
            ways[way.key] = way
    return [ways[p.key] for p in spread(non_dominated(points), baseline, count) if p.key in ways]
