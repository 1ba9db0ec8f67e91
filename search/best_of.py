"""What the time that a pick saves buys: several pictures of a prompt, of which an evaluator keeps the best.

Best-of-N, the plainest search over noise (arXiv 2501.09732, Sec. 3): a policy that takes a third of the time draws
three pictures while the unmodified model draws one. Not covered: searching for better noise than chance's.
"""

from typing import Any

import numpy as np

from ..evaluators import get, paired_interval, scale_of
from .candidate import Candidate
from .front import Confirmed, held_out_name, is_fidelity, short
from .pool import Job
from .prompts import read_prompts
from .study import Study


def best_of(
    study: Study, picked: list[Confirmed], candidates: dict[str, Candidate], judge: str, unmodified: float
) -> None:
    """Add to every pick what it does when it draws two pictures and more, and the best by `judge` is kept.

    As many as with their scoring take no longer than one of the unmodified model, of which a batch takes `unmodified`
    seconds; against that one on all held-out prompts, with 95 % intervals for each alone.
    """
    config, run, pool = study.config, study.run, study.pool
    prompts = read_prompts(config, "confirm")
    plain = run.read_images("confirm-unmodified")
    (timed,) = pool.run([Job("time_scoring", (judge, plain[: config.generation.batch]))])
    share = {c.key: 1 / c.speedup + timed.result / unmodified for c in picked}  # of that time, for each picture
    draws = {c.key: int(1 / share[c.key]) for c in picked}

    def name(c: Confirmed, draw: int) -> str:
        return f"best-of-{short(c.key)}-{draw}" if draw else held_out_name(c)

    def keep(job: Job) -> None:
        run.write_scores(name(*job.tag), prompts, job.result.scores)

    wanted = [(c, draw) for c in picked for draw in range(1, draws[c.key])]
    missing = [(c, draw) for c, draw in wanted if not (run.scores / f"{name(c, draw)}.parquet").exists()]
    reference = pool.put(plain)
    jobs = [
        Job("measure", (candidates[c.key], "confirm", reference, None, 0, None, draw), (c, draw)) for c, draw in missing
    ]
    pool.run(jobs, keep)

    objectives, before = config.objectives, run.read_scores("confirm-unmodified")
    names = dict.fromkeys((objectives.alignment, objectives.quality, *objectives.reported))
    texts, sign = list(before["prompt"]), 1 if get(judge).direction == "maximize" else -1
    for c in picked:
        drawn = [run.read_scores(name(c, draw)) for draw in range(draws[c.key])]
        for count in range(2, len(drawn) + 1):
            chosen = np.argmax([sign * scores[judge] for scores in drawn[:count]], axis=0)
            told: dict[str, Any] = {"by": judge, "count": count, "speedup": 1 / (count * share[c.key])}
            for evaluator in names:
                if not is_fidelity(evaluator):
                    kept = np.choose(chosen, [scores[evaluator] for scores in drawn[:count]])
                    scale = scale_of(get(evaluator))
                    told[evaluator] = paired_interval(kept, before[evaluator], groups=texts, scale=scale).points
            c.best_of.append(told)
