"""What the time that a pick saves buys: several pictures of a prompt, of which an evaluator keeps the best.

Best-of-N, the plainest search over noise (arXiv 2501.09732, Sec. 3): a policy that takes a third of the time draws
three pictures while the unmodified model draws one. Not covered: searching for better noise than chance's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluators import Interval, get, paired_interval, scale_of
from .candidate import Candidate
from .front import Confirmed, held_out_name, is_fidelity, short
from .pool import Job
from .prompts import read_prompts
from .study import Study


def of_the_best(
    drawn: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    judge: str,
    names: Iterable[str],
    texts: Sequence[str],
) -> dict[str, Interval]:
    """By evaluator, how the picture of each prompt that `judge` likes best compares with the one in `before`.

    `drawn` are the scores `(n,)` of every draw by evaluator, `before` those of the unmodified model, `texts` the
    prompts. Paired, with 95 % intervals for each alone.
    """
    sign = 1 if get(judge).direction == "maximize" else -1
    chosen = np.argmax([sign * np.asarray(scores[judge]) for scores in drawn], axis=0)
    kept = {name: np.choose(chosen, [scores[name] for scores in drawn]) for name in names}
    return {
        name: paired_interval(values, before[name], groups=texts, scale=scale_of(get(name)))
        for name, values in kept.items()
    }


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
    if max(draws.values()) < 2:
        part = timed.result / unmodified
        study.display.say(
            f"no pick leaves time for a second picture: {judge} takes {part:.2f} of the time of a picture"
        )

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
    reported = dict.fromkeys((objectives.alignment, objectives.quality, *objectives.reported))
    names = [evaluator for evaluator in reported if not is_fidelity(evaluator)]
    for c in picked:
        drawn = [run.read_scores(name(c, draw)) for draw in range(draws[c.key])]
        for count in range(2, len(drawn) + 1):
            told: dict[str, Any] = {"by": judge, "count": count, "speedup": 1 / (count * share[c.key])}
            gains = of_the_best(drawn[:count], before, judge, names, list(before["prompt"]))
            c.best_of.append(told | {evaluator: gain.points for evaluator, gain in gains.items()})
