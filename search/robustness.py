"""How far a pick holds beyond itself: what its neighbours in the space lose, and what it does at other settings."""

from typing import Any

import numpy as np
import optuna

from ..evaluators import get, paired_interval, scale_of
from ..policies import BlockPolicy
from .front import Confirmed, Point
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
    names = {f"neighbour-{near[i].key[:16]}-{near[i].steps}": near[i] for i in order}

    def keep(job: Job) -> None:
        run.write_scores(job.tag, study.prompts, job.result.scores)

    missing = {name: one for name, one in names.items() if not (run.scores / f"{name}.parquet").exists()}
    study.pool.run(
        [Job("measure", (c.policy, c.steps, "search", study.unmodified.images), name) for name, c in missing.items()],
        keep,
    )
    measured = f"trial-{trial.user_attrs.get('same_as', trial.number):04d}"
    own = study.unmodified.differences(run.read_scores(measured))
    falls = [(study.unmodified.differences(run.read_scores(name)) - own).mean(axis=0) for name in names]
    alignment, quality = np.min(falls, axis=0) if falls else (0.0, 0.0)
    return {"count": len(falls), "alignment": float(alignment), "quality": float(quality)}


def transfers(study: Study, picked: list[Confirmed], policies: dict[str, BlockPolicy]) -> None:
    """Add to every pick what it does at each setting of `confirm.transfer`, against the unmodified model there.

    On as many held-out prompts as a search has pictures, with 95 % intervals for each alone.
    """
    config, pool = study.config, study.pool
    prompts = read_prompts(config, "confirm")[: config.prompts.search_images]
    groups = [p.text for p in prompts]
    plain = Point("unmodified", 0.0, 0.0, 0.0, steps=config.generation.num_inference_steps)
    for setting in config.confirm.transfer:
        changed = setting.model_dump(exclude_none=True)

        def job(point: Point | Confirmed, policy: BlockPolicy, images: Any, changed: dict[str, Any] = changed) -> Job:
            steps = changed.get("num_inference_steps", point.steps)
            return Job("measure", (policy, steps, "confirm", images, len(prompts), 0, changed), point)

        unmodified = BlockPolicy(name="unmodified", model=study.model, rules=())
        (before,) = pool.run([job(plain, unmodified, None)])
        reference = pool.put(before.result.images)
        for after in pool.run([job(c, policies[c.key], reference) for c in picked]):
            told: dict[str, Any] = {"setting": changed}
            for objective in ("alignment", "quality"):
                name = getattr(config.objectives, objective)
                pair = after.result.scores[name], before.result.scores[name]
                told[objective] = paired_interval(*pair, groups=groups, scale=scale_of(get(name))).points
            after.tag.transfer.append(told)
