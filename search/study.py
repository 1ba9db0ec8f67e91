"""The search: Optuna proposes in this process, workers measure, and what is finished survives any kill.

A trial has its scores and attributes written before MLflow and Optuna are told, its `metrics` or `reason` last: on
resume, one that has them is told again, any other is run again.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from ..evaluators import CostTable, get
from ..policies import BlockPolicy
from .config import Config, ConfigError
from .front import Point, hypervolume, non_dominated
from .pool import Job, Pool
from .progress import Display
from .prompts import read_prompts
from .run_directory import RunDirectory
from .space import Candidate, anchors, candidate, distributions, steps_of, suggest
from .storage import STUDY, feasible, open_storage, point_of, study_url
from .tracking import Tracker
from .worker import Measurement


def _sampler(config: Config, seed: int) -> optuna.samplers.BaseSampler:
    samplers = {
        # multivariate must be asked for: Optuna 5 leaves it off for several objectives
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return samplers[config.search.sampler]()


def check_objectives(config: Config) -> None:
    """Raise what is wrong with evaluators and prompts before anything is started or written."""
    objectives = config.objectives
    for name in (objectives.alignment, objectives.quality, *objectives.reported):
        evaluator = get(name)
        if name not in objectives.reported and evaluator.direction != "maximize":
            raise ConfigError(f"objectives name {name!r}, which is to be minimised; accepted: evaluators to maximise.")
    for split in ("search", "confirm"):
        read_prompts(config, split)


class Study:
    """One search in one run directory."""

    def __init__(self, config: Config, run: RunDirectory, pool: Pool, tracker: Tracker, display: Display):
        self.config, self.run, self.pool, self.tracker, self.display = config, run, pool, tracker, display
        self.model = pool.description.model
        self.prompts = read_prompts(config, "search")
        self._space = distributions(config, self.model.num_blocks)
        self._anchors = anchors(config, self.model.num_blocks)
        self._prepare_baseline()
        self._open()

    def _prepare_baseline(self) -> None:
        """The unmodified model's pictures and scores, and the cost table: measured once, kept in the run directory."""
        unmodified = candidate(self._anchors["unmodified"], self.config, self.model, "unmodified")
        table = self.run.path / "cost_table.json"
        if not table.exists():
            self.display.say("measuring the cost of every block")
            (job,) = self.pool.run([Job("cost_table", ())])
            self.run.write_text(table, job.result.model_dump_json(indent=2) + "\n")
        self.costs = CostTable.model_validate_json(table.read_text())
        if not (self.run.scores / "unmodified.parquet").exists():
            self.display.say("generating with the unmodified model")
            (job,) = self.pool.run([Job("measure", (unmodified.policy, unmodified.steps, "search", None))])
            self.run.write_images("unmodified", job.result.images)
            self.run.write_scores("unmodified", self.prompts, job.result.scores)
        images = self.run.read_images("unmodified")
        self._reference = self.pool.put(images)
        scores = self.run.read_scores("unmodified")
        objectives = self.config.objectives
        latency = self._latency(unmodified)
        self.baseline = Point(
            "unmodified",
            float(scores[objectives.alignment].to_numpy().mean()),
            float(scores[objectives.quality].to_numpy().mean()),
            latency,
            unmodified.key,
        )

    def _latency(self, chosen: Candidate) -> float:
        """Predicted seconds of a batch: noise of timing would mislead the sampler; confirm times for real."""
        return self.costs.predict_policy(chosen.policy, chosen.steps)

    def _open(self) -> None:
        """Create the Optuna study or take it up again: a stored one must be of the same search, its zombies re-run."""
        space = {k: optuna.distributions.distribution_to_json(d) for k, d in self._space.items()}
        what = {"searched": self.config.searched(), "model": self.model.model_dump(mode="json"), "space": space}
        fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        storage = open_storage(study_url(self.run, self.config))
        self.study = optuna.create_study(
            study_name=STUDY, storage=storage, directions=["maximize", "maximize", "minimize"], load_if_exists=True
        )
        known = self.study.user_attrs.get("fingerprint")
        if known not in (None, fingerprint):
            raise ConfigError(
                "the stored study is of another model, space or objective; resume with the same, or start another run."
            )
        self.study.set_user_attr("fingerprint", fingerprint)
        described = self.pool.description
        on = {"device": described.device, "dtype": described.dtype, "workers": self.pool.size}
        self.study.set_user_attr("description", on | {"versions": described.versions})
        trials = self.study.get_trials(deepcopy=False)
        self.study.sampler = _sampler(self.config, self.config.search.seed + len(trials))
        enqueued = {t.user_attrs.get("anchor") for t in trials}
        for name, params in self._anchors.items():
            if name not in enqueued:  # a kill may have come between two of them
                inside = {} if self._outside(name) else {k: v for k, v in params.items() if k in self._space}
                self.study.enqueue_trial(inside, user_attrs={"anchor": name})
        retried = {t.user_attrs.get("retry_of") for t in trials}
        for zombie in trials:
            if zombie.state != TrialState.RUNNING:
                continue
            if "metrics" in zombie.user_attrs or "reason" in zombie.user_attrs:
                self._close(zombie)
                continue
            if zombie.number not in retried:  # one with a retry was met by a resume that was killed itself
                again = {k: v for k, v in zombie.user_attrs.items() if k == "anchor"} | {"retry_of": zombie.number}
                self.study.enqueue_trial(zombie.params, user_attrs=again)
            self.study.tell(zombie.number, state=TrialState.FAIL)
        # of equal ones the first: it was measured, the others stand on it
        self._known = {t.user_attrs["key"]: t for t in reversed(feasible(self.study))}

    def finished(self) -> int:
        """Trials that count: complete, or failed for a reason of their own and not by a kill."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        return sum(t.state == TrialState.COMPLETE or "reason" in t.user_attrs for t in trials)

    def search(self) -> None:
        """Run until the config's number of trials has finished."""
        total = self.config.search.trials
        done = self.finished()
        self.display.trials(done, total, self.standing(), 0, 0.0)
        while done < total:
            while self.pool.free and done + self.pool.busy < total:
                trial, chosen = self._ask()
                if chosen.key in self._known:
                    self._tell_known(trial, chosen)
                    done += 1
                    continue
                self.pool.submit(
                    Job("measure", (chosen.policy, chosen.steps, "search", self._reference), (trial, chosen))
                )
            if not self.pool.busy:
                continue
            for job in self.pool.wait(timeout=1.0):
                self._tell(job)
                done += 1
            self.display.tick()

    def _outside(self, anchor: str) -> bool:
        """Whether the anchor lies outside of the space: its sampler must not learn from it."""
        return self._anchors[anchor]["steps"] not in steps_of(self.config)

    def _ask(self) -> tuple[optuna.Trial, Candidate]:
        trial = self.study.ask()
        anchor: str | None = trial.user_attrs.get("anchor")
        params = self._anchors[anchor] if anchor and self._outside(anchor) else suggest(trial, self._space)
        return trial, candidate(params, self.config, self.model, f"trial {trial.number}")

    def _tell_known(self, trial: optuna.Trial, chosen: Candidate) -> None:
        """The same behaviour spelled otherwise is one policy: its scores stand."""
        known = self._known[chosen.key]
        trial.set_user_attr("same_as", known.number)
        trial.set_constraint("insane_pictures", known.constraints["insane_pictures"])
        unspent = {"generate_seconds": 0.0, "score_seconds": 0.0, "steps_saved": 1.0}
        self._attributes(trial, chosen, metrics=known.user_attrs["metrics"] | unspent)
        self._close(trial)
        self._after(trial.number, chosen, 0, 0.0)

    @staticmethod
    def _attributes(trial: optuna.Trial, chosen: Candidate, **outcome: Any) -> None:
        """What the trial measured, and last its `metrics` or the `reason` it failed for: with that it is whole."""
        for name, value in {"key": chosen.key, "steps": chosen.steps}.items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("policy", chosen.policy.model_dump(mode="json", exclude_none=True))
        for name, value in outcome.items():
            trial.set_user_attr(name, value)

    def _close(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
        """Tell MLflow, then Optuna, what the attributes of `trial` say; after a kill in between, both again."""
        told = trial.user_attrs
        policy, metrics, reason = BlockPolicy.model_validate(told["policy"]), told.get("metrics"), told.get("reason")
        self.tracker.trial(trial.number, trial.datetime_start, trial.params, metrics or {}, policy, reason)
        if metrics is None:
            return self.study.tell(trial.number, state=TrialState.FAIL)
        objectives = self.config.objectives
        return self.study.tell(
            trial.number, [metrics[objectives.alignment], metrics[objectives.quality], metrics["latency"]]
        )

    def _tell(self, job: Job) -> None:
        trial, chosen = job.tag
        measured: Measurement | None = job.result
        reason = job.error
        if measured is not None:
            broken = [name for name, values in measured.scores.items() if not np.isfinite(values).all()]
            reason = f"{', '.join(broken)} gave scores that are not finite" if broken else None
        if reason or measured is None:
            self._attributes(trial, chosen, reason=reason)
            self._close(trial)
            self.display.say(f"trial {trial.number} failed: {reason}")
            self._after(trial.number, chosen, 0, 0.0)
            return
        means = {name: float(values.mean()) for name, values in measured.scores.items()}
        latency = self._latency(chosen)
        metrics = means | {
            "latency": latency,
            "speedup": self.baseline.latency / latency,
            "generate_seconds": measured.generate_seconds,
            "score_seconds": measured.score_seconds,
            "steps_saved": measured.steps_saved,
        }
        self.run.write_scores(f"trial-{trial.number:04d}", self.prompts, measured.scores)
        before = self.run.read_scores("unmodified")["sane"].to_numpy()
        insane = float((measured.scores["sane"] < 1).sum() - (before < 1).sum())
        trial.set_constraint("insane_pictures", insane)
        self._attributes(trial, chosen, metrics=metrics)
        frozen = self._close(trial)
        if insane <= 0:
            self._known[chosen.key] = frozen
        self._after(trial.number, chosen, len(measured.images), measured.generate_seconds)

    def standing(self) -> dict[str, float]:
        points = [point_of(t) for t in feasible(self.study)]
        if not points:
            return {}
        return {
            "best_alignment": max(p.alignment for p in points),
            "best_quality": max(p.quality for p in points),
            "best_speedup": max(self.baseline.latency / p.latency for p in points),
            "hypervolume": hypervolume(points, self.baseline),
            "front": float(len(non_dominated(points))),
            "failed": float(len(self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))),
        }

    def spent(self) -> dict[str, float]:
        """Pictures made and seconds of workers in the trials that were measured; those of GPUs where there are.

        `steps_saved` is the share of their denoising steps that earlier candidates had taken alike.
        """
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        measured = [t.user_attrs["metrics"] for t in trials if "same_as" not in t.user_attrs]
        seconds = sum(m["generate_seconds"] + m["score_seconds"] for m in measured)
        spent = {"images": float(len(measured) * len(self.prompts)), "worker_seconds": seconds}
        spent |= {"steps_saved": sum(m.get("steps_saved", 0.0) for m in measured) / max(1, len(measured))}
        return spent | ({"gpu_seconds": seconds * self.pool.gpus} if self.pool.gpus else {})

    def _after(self, number: int, chosen: Candidate, images: int, seconds: float) -> None:
        standing = self.standing()
        self.tracker.progress(number, standing | self.spent())
        self.display.trials(self.finished(), self.config.search.trials, standing, images, seconds)

    def front(self) -> list[Point]:
        """Non-dominated feasible trials, fastest first."""
        return non_dominated([point_of(t) for t in feasible(self.study)])

    def front_table(self) -> list[dict[str, Any]]:
        """The front as rows for a person, fastest first."""
        return [
            {"candidate": p.name, "steps": p.steps, "alignment": p.alignment, "quality": p.quality,
             "latency": p.latency, "speedup": self.baseline.latency / p.latency, "key": p.key[:16]}
            for p in self.front()
        ]  # fmt: skip

    def cautious(self, trial: optuna.trial.FrozenTrial) -> Point:
        """A trial's point with alignment and quality lower by the standard error of what they differ from baseline."""
        point, objectives = point_of(trial), self.config.objectives
        number = trial.user_attrs.get("same_as", trial.number)
        after, before = self.run.read_scores(f"trial-{number:04d}"), self.run.read_scores("unmodified")
        alignment, quality = ((after[name] - before[name]).sem() for name in (objectives.alignment, objectives.quality))
        return replace(point, alignment=point.alignment - alignment, quality=point.quality - quality)
