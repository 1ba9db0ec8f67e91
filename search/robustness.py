"""How far a pick holds beyond itself: what its neighbours in the space lose, and what it does at other settings."""

from typing import Any

import numpy as np
import optuna

from ..evaluators import get, paired_interval, scale_of
from .candidate import Candidate
from .front import Confirmed, short
from .pool import Job
from .prompts import read_prompts
from .space import neighbours
from .study import Study


def worst_falls(study: Study, trial: optuna.trial.FrozenTrial) -> dict[str, float]:
    """Of some neighbours of a candidate on the search prompts, how many, and the lowest mean differences to it.

    In shares of 100 points. Each is one of several means on as many pictures as a search draws: chance alone makes the
    lowest of them a fall.
    """
    config, run = study.config, study.run
    near = neighbours(trial.params, config, study.model)
    order = np.random.default_rng(config.search.seed).permutation(len(near))[: config.confirm.neighbours]
    names = {f"neighbour-{short(near[i].key)}": near[i] for i in order}

    def keep(job: Job) -> None:
        run.write_scores(job.tag, study.prompts, job.result.scores)

    missing = {name: one for name, one in names.items() if not (run.scores / f"{name}.parquet").exists()}
    jobs = [Job("measure", (c, "search", study.unmodified.images), name) for name, c in missing.items()]
    study.pool.run(jobs, keep)
    measured = f"trial-{trial.user_attrs.get('same_as', trial.number):04d}"
    own = study.unmodified.differences(run.read_scores(measured))
    falls = [(study.unmodified.differences(run.read_scores(name)) - own).mean(axis=0) for name in names]
    alignment, quality = np.min(falls, axis=0) if falls else (0.0, 0.0)
    return {"count": len(falls), "alignment": float(alignment), "quality": float(quality)}


def transfers(study: Study, picked: list[Confirmed], candidates: dict[str, Candidate]) -> None:
    """Add to every pick what it does at each setting of `confirm.transfer`, against the unmodified model there.

    On as many held-out prompts as a search has pictures, with 95 % intervals for each alone.
    """
    config, pool = study.config, study.pool
    prompts = read_prompts(config, "confirm")[: config.prompts.search_images]
    groups = [p.text for p in prompts]
    for setting in config.confirm.transfer:
        changed = setting.model_dump(exclude_none=True)

        def job(chosen: Candidate, images: Any, tag: Any = None, changed: dict[str, Any] = changed) -> Job:
            return Job("measure", (chosen, "confirm", images, len(prompts), 0, changed), tag)

        (before,) = pool.run([job(study.unmodified.candidate, None)])
        reference = pool.put(before.result.images)
        for after in pool.run([job(candidates[c.key], reference, c) for c in picked]):
            told: dict[str, Any] = {"setting": changed}
            for objective in ("alignment", "quality"):
                name = getattr(config.objectives, objective)
                pair = after.result.scores[name], before.result.scores[name]
                told[objective] = paired_interval(*pair, groups=groups, scale=scale_of(get(name))).points
            after.tag.transfer.append(told)
