"""Confirm: the front and the anchors again, on prompts the search never saw, with new seeds, and timed for real."""

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ..evaluators import (
    Interval,
    Latency,
    get,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_interval,
    paired_t_test,
    scale_of,
    speedup,
)
from ..policies import BlockPolicy
from .best_of import best_of
from .candidate import Candidate
from .config import Objectives
from .front import Confirmed, Point, chance_to_hold, held_out_name, hypervolume, is_fidelity, pick, shortlist, slug
from .pool import Job
from .prompts import read_prompts
from .robustness import transfers, worst_falls
from .scoring import judge_of
from .storage import feasible, point_of
from .study import Study


def confirm(study: Study) -> list[Confirmed]:
    """Measure the chosen candidates and the anchors; write `confirmed.json` and the picks' policies.

    They are chosen by cautious estimates, since the best of many noisy means are mostly luck.
    Intervals are paired by prompt and seed, grouped by prompt, and widened for the number of candidates compared
    (Bonferroni), p-values adjusted for it (Holm). Timing runs on one worker while the others rest, the candidates
    of a turn one after another, the unmodified model before and after them.
    """
    config, run, pool = study.config, study.run, study.pool
    prompts = read_prompts(config, "confirm")
    trials = {t.user_attrs["key"]: t for t in reversed(feasible(study.study, anchors=True))}
    points = {key: point_of(t) for key, t in trials.items() if key != study.baseline.key}
    differences = {key: study.differences(trials[key]) for key in points}
    named = [p for p in points.values() if p.anchor]
    beside = [study.baseline.cautious(p, differences[p.key]) for p in named]
    own = [study.baseline.cautious(p, differences[p.key]) for p in points.values() if not p.anchor]
    compared, margins = len(named) + config.confirm.candidates, (config.confirm.margin, config.confirm.quality_margin)
    texts = [p.text for p in study.prompts]
    chances = {key: chance_to_hold(shown, texts, len(prompts), compared, margins) for key, shown in differences.items()}
    chosen = [*named, *shortlist(own, study.baseline, config.confirm.candidates, chances, beside)]
    policies = {p.key: BlockPolicy.model_validate(trials[p.key].user_attrs["policy"]) for p in chosen}
    candidates = {p.key: Candidate(policies[p.key], p.steps, p.guidance_scale) for p in chosen}
    unmodified = study.unmodified.candidate

    study.display.say(f"confirming {len(chosen)} candidates on {len(prompts)} held-out pictures each")
    study.display.stage("confirm", len(chosen) + 1)
    if not (run.scores / "confirm-unmodified.parquet").exists():
        (job,) = pool.run([Job("measure", (unmodified, "confirm", None))])
        run.write_images("confirm-unmodified", job.result.images)
        run.write_scores("confirm-unmodified", prompts, job.result.scores)
    study.display.advance("unmodified")
    reference = pool.put(run.read_images("confirm-unmodified"))

    def keep(job: Job) -> None:
        measured = job.result
        run.write_scores(held_out_name(job.tag), prompts, measured.scores, measured.distances)
        run.write_images(held_out_name(job.tag), measured.images[:48])
        study.display.advance(job.tag.name)

    missing = [p for p in chosen if not (run.scores / f"{held_out_name(p)}.parquet").exists()]
    pool.run([Job("confirm", (candidates[p.key], reference), p) for p in missing], keep)

    study.display.say("timing the candidates on a quiet device")
    study.display.stage("timing", config.confirm.repeats)
    turns: list[list[Latency]] = []
    for turn in range(config.confirm.repeats):  # one after another, each by the worker that was last at work
        (job,) = pool.run([Job("time", ([unmodified, *(candidates[p.key] for p in chosen), unmodified],))])
        turns.append(ends_as_one(job.result))
        study.display.advance(f"turn {turn + 1}")
    (whole, inside), *timed = [
        ([t.pipeline for t in of], [t.transformer for t in of]) for of in zip(*turns, strict=True)
    ]

    before = run.read_scores("confirm-unmodified")
    scored = {p.key: run.read_scores(held_out_name(p)) for p in chosen}
    level = 1 - 0.05 / max(1, len(chosen))
    p_values = adjusted_p_values(config.objectives, before, list(scored.values()))

    def interval(point: Point, evaluator: str, of: Callable[..., Interval] = paired_interval) -> Interval:
        groups, scale = list(before["prompt"]), scale_of(get(evaluator))
        return of(scored[point.key][evaluator], before[evaluator], groups=groups, level=level, scale=scale)

    confirmed = [
        Confirmed(
            name=p.name, key=p.key, steps=p.steps, anchor=p.anchor, rules=_told(policies[p.key]),
            alignment=interval(p, config.objectives.alignment),
            quality=interval(p, config.objectives.quality),
            reported={name: interval(p, name) for name in config.objectives.reported},
            seconds=median(seconds), speedup=speedup(whole, seconds),
            transformer_seconds=median(part), transformer_speedup=speedup(inside, part),
            predicted_speedup=study.baseline.latency / p.latency,
            guidance_scale=p.guidance_scale,
            bootstrap=interval(p, config.objectives.alignment, paired_bootstrap),
            p_values=adjusted,
            **{name: scored[p.key].attrs.get(name) for name in ("cmmd", "fid")},
        )
        for p, (seconds, part), adjusted in zip(chosen, timed, p_values, strict=True)
    ]  # fmt: skip
    picks = pick(confirmed, config.confirm.margin, config.confirm.quality_margin)
    for name, member in picks.items():
        member.picks.append(name)
    picked = [c for c in confirmed if c.picks]
    if picked and config.confirm.neighbours:
        study.display.say(f"measuring {config.confirm.neighbours} neighbours of each pick")
        for member in picked:
            member.neighbours.update(worst_falls(study, trials[member.key]))
    if picked and config.confirm.transfer:
        study.display.say(f"measuring the picks at {len(config.confirm.transfer)} other settings")
        transfers(study, picked, candidates)
    if picked and (judge := judge_of(config)):
        study.display.say(f"drawing in the time that picks save, and keeping the best by {judge}")
        best_of(study, picked, candidates, judge, median(whole))
    for stale in run.policies.glob("*.json"):
        stale.unlink()
    # every confirmed candidate under the name of its trial, and the picks under theirs
    named_files = {slug(c.name): c for c in confirmed if c.rules} | picks
    for name, member in named_files.items():
        _file(study, name, member, candidates[member.key], len(confirmed)).save(run.policies / f"{name}.json")
    baseline = {"seconds": median(whole), "transformer_seconds": median(inside)}
    baseline |= {"hypervolume": hypervolume(study.tally.front, study.baseline)}
    record = {
        "baseline": baseline,
        "level": level,
        "margin": config.confirm.margin,
        "quality_margin": config.confirm.quality_margin,
        "confirmed": [c.to_dict() for c in confirmed],
    }
    run.write_json(run.confirmed, record)
    return confirmed


def ends_as_one(turn: Sequence[Latency]) -> list[Latency]:
    """A turn whose first and last are of the same model, with their mean as the first, and no last.

    A shared machine slows down for some seconds, or drifts: one run alone would move all that is held against it.
    """
    first, *others, last = turn
    return [Latency((first.pipeline + last.pipeline) / 2, (first.transformer + last.transformer) / 2), *others]


def adjusted_p_values(objectives: Objectives, before: Any, after: Sequence[Any]) -> list[dict[str, float]]:
    """For each of `after` the p-values of its differences to `before`, tables of scores per picture, by evaluator.

    Alignment by a paired t test, reported scores that are 0 or 1 throughout by McNemar's exact test; prompts stay whole
    in both. Each evaluator's are adjusted by Holm for the number of candidates.
    """
    binary = [
        name
        for name in objectives.reported
        if name != objectives.alignment
        and not is_fidelity(name)
        and all(scores[name].isin((0, 1)).all() for scores in (before, *after))
    ]
    tests = {objectives.alignment: paired_t_test} | dict.fromkeys(binary, mcnemar)
    groups = list(before["prompt"])
    adjusted = {
        name: holm([test(scores[name], before[name], groups) for scores in after]) for name, test in tests.items()
    }
    return [{name: float(p[i]) for name, p in adjusted.items()} for i in range(len(after))]


def _told(policy: BlockPolicy) -> int:
    """How many things the policy tells a model to do: its rules, and a window of guidance."""
    return len(policy.rules) + policy.guides_in_part


def _file(study: Study, name: str, member: Confirmed, candidate: Candidate, compared: int) -> BlockPolicy:
    """The policy as exported: what it was tuned for, and the evidence."""
    generation, description = study.config.generation, study.pool.description

    def told(interval: Interval) -> dict:
        return {
            "value": interval.value, "baseline": interval.baseline, "delta": interval.delta,
            "ci95": [interval.low, interval.high], "level": interval.level, "n": interval.n,
        }  # fmt: skip

    objectives = study.config.objectives
    measured = {objectives.alignment: told(member.alignment), objectives.quality: told(member.quality)}
    measured |= {key: told(value) for key, value in member.reported.items()}
    own = {"num_inference_steps": generation.num_inference_steps, "guidance_scale": generation.guidance_scale}
    return candidate.policy.model_copy(
        update={
            "name": name,
            "tuned_for": {
                **own,
                **candidate.sampling,
                "height": description.height,
                "width": description.width,
                "max_sequence_length": generation.max_sequence_length,
                "scheduler": description.scheduler,
                "dtype": description.dtype,
            },
            "evidence": {
                "confirmed": measured | {"speedup": member.speedup, "seconds_per_batch": member.seconds},
                "best_of": member.best_of,
                "compared": compared,
                "unmodified": {field: own[field] for field in candidate.sampling} | {"batch": generation.batch},
                "device": description.device,
                "versions": description.versions,
                "study": study.config.name,
                "trial": member.name,
                "mlflow_run_id": study.tracker.run_id,
            },
        }
    )


def load_confirmed(run) -> tuple[dict, list[Confirmed]]:
    """What `confirm` wrote."""
    record = json.loads(run.confirmed.read_text())
    record.setdefault("quality_margin", record["margin"])  # runs of before had one margin for both
    return record, [Confirmed.from_dict(c) for c in record["confirmed"]]
