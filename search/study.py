"""The search: Optuna proposes in this process, workers measure, and what is finished survives any kill.

A trial is written as it goes to a worker, its scores and attributes before MLflow and Optuna are told, its `metrics`
or `reason` last: on resume, one that has them is told again, any other is run again.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from ..evaluators import get, scale_of
from ..policies import BlockPolicy
from .budget import Budget
from .candidate import Candidate
from .config import Config, ConfigError
from .entry import Entry
from .front import guidance_column
from .pool import Job, Pool
from .prior import prior, read_probe
from .progress import Display
from .prompts import read_prompts
from .racing import Race
from .run_directory import RunDirectory
from .scoring import judge_of
from .space import Around, anchors, candidate, distributions, steps_of, suggest
from .storage import STUDY, Storage, feasible, point_of, study_url
from .tally import Tally
from .tracking import Tracker
from .unmodified import Unmodified


def new_sampler(config: Config, seed: int) -> optuna.samplers.BaseSampler:
    samplers = {
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
        # multivariate must be asked for: Optuna 5 leaves it off for several objectives; in groups, because an anchor
        # outside of the space has no params, and with it no choice would be common to all trials and sampled together
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of TPE's groups, which Optuna has had since 2.8
        return samplers[config.search.sampler]()


@contextmanager
def given(study: optuna.Study, params: dict[str, Any] | None) -> Iterator[None]:
    """What is asked and suggested meanwhile has these choices, where there are any, and the sampler is not asked."""
    sampler = study.sampler
    if params:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna has had it since 2.4
            # with random choices for what is left, which is nothing: TPE in groups would choose everything in vain
            study.sampler = optuna.samplers.PartialFixedSampler(params, optuna.samplers.RandomSampler())
    try:
        yield
    finally:
        study.sampler = sampler


def join_population(study: optuna.Study, trial: optuna.Trial) -> None:
    """Let a genetic sampler choose a trial as a parent, whose choices it has not proposed.

    Optuna counts only what such a sampler proposed itself among its generations.
    """
    if isinstance(study.sampler, optuna.samplers.BaseGASampler):
        study.sampler.get_trial_generation(study, study._storage.get_trial(trial._trial_id))


def check_objectives(config: Config) -> None:
    """Raise what is wrong with evaluators and prompts before anything is started or written."""
    objectives = config.objectives
    for name in (objectives.alignment, objectives.quality, *objectives.reported):
        evaluator = get(name)
        if name not in objectives.reported and evaluator.direction != "maximize":
            raise ConfigError(f"objectives name {name!r}, which is to be minimised; accepted: evaluators to maximise.")
    for name in config.constraints.min_fidelity:
        if name not in objectives.reported:
            accepted = ", ".join(objectives.reported)
            raise ConfigError(f"constraints.min_fidelity names {name!r}; accepted: what is reported, {accepted}.")
    judge_of(config)
    read_probe(config)
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
        self._around = Around(config, self.model)
        plain = candidate(self._anchors["unmodified"], config, self.model, "unmodified")
        self.unmodified = Unmodified(plain, self.prompts, config, run, pool, display)
        self.baseline = self.unmodified.point
        self._race = Race(len(self.prompts), self.unmodified.slowest)
        timed = (2 + config.confirm.candidates + len(self._anchors)) * config.generation.batch
        self._largest = max(timed, len(self.prompts), len(read_prompts(config, "confirm")))  # job, in pictures
        self._open()

    def _open(self) -> None:
        """Create the Optuna study or take it up again: a stored one must be of the same search, its zombies re-run."""
        space = {k: optuna.distributions.distribution_to_json(d) for k, d in self._space.items()}
        what = {"searched": self.config.searched(), "model": self.model.model_dump(mode="json"), "space": space}
        fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        self._storage = Storage(study_url(self.run, self.config))
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=self._storage,
            directions=["maximize", "maximize", "minimize"],
            load_if_exists=True,
        )
        known = self.study.user_attrs.get("fingerprint")
        if known not in (None, fingerprint):
            raise ConfigError(
                "the stored study is of another model, space or objective; resume with the same, or start another run."
            )
        self.study.set_user_attr("fingerprint", fingerprint)
        described = self.pool.description
        objectives = self.config.objectives
        names = objectives.alignment, objectives.quality, *objectives.reported
        on = {"device": described.device, "dtype": described.dtype, "workers": self.pool.size}
        on |= {"scales": {name: scale_of(get(name)) for name in names}}  # what counts as 100 points
        self.study.set_user_attr("description", on | {"versions": described.versions})
        trials = self.study.get_trials(deepcopy=False)
        self.study.sampler = new_sampler(self.config, self.config.search.seed + len(trials))
        room = self.config.search.trials - len(trials)
        for mark, points in (("anchor", self._anchors), ("origin", prior(self.config, self.model))):
            enqueued = {t.user_attrs.get(mark) for t in trials}
            missing = [name for name in points if name not in enqueued]  # a kill may have come between two of them
            for name in missing[: max(room, 0)]:
                params = points[name]
                inside = {} if self._outside(params) else {k: v for k, v in params.items() if k in self._space}
                self.study.enqueue_trial(inside, user_attrs={mark: name})
            room -= len(missing)
        retried = {t.user_attrs.get("retry_of") for t in trials}
        for zombie in trials:
            if zombie.state != TrialState.RUNNING:
                continue
            if "metrics" in zombie.user_attrs or "reason" in zombie.user_attrs:
                self._close(zombie)
                continue
            if zombie.number not in retried:  # one with a retry was met by a resume that was killed itself
                again = {k: v for k, v in zombie.user_attrs.items() if k in ("anchor", "origin")}
                self.study.enqueue_trial(zombie.params, user_attrs=again | {"retry_of": zombie.number})
            self.study.tell(zombie.number, state=TrialState.FAIL)
        self.tally = Tally(self.baseline, len(self.prompts))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            self.tally.add(trial)
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # by behaviour; of equal ones the first: it was measured, the others stand on it
        self._known = {self._stored(t).behaviour: t for t in reversed(complete)}
        for trial in feasible(self.study):
            if "same_as" not in trial.user_attrs:
                scores = self.run.read_scores(f"trial-{trial.number:04d}")
                self._race.finish(self.unmodified.differences(scores), point_of(trial).latency)
        self._allow()

    @staticmethod
    def _stored(trial: FrozenTrial) -> Candidate:
        """What a trial measured."""
        told = trial.user_attrs
        return Candidate(BlockPolicy.model_validate(told["policy"]), told["steps"], told.get("guidance_scale"))

    @property
    def ended(self) -> str | None:
        """The limit at which the search came to its end; None while it has not."""
        return self.study.user_attrs.get("ended")

    def search(self) -> None:
        """Run until a limit of the config is reached, and what runs by then has finished."""
        limits = self.config.search
        done, images = self.tally.finished, self.tally.spent["images"]
        # behaviours that are being measured, and the trials that turned out the same meanwhile
        self._measuring: dict[str, list[tuple[optuna.Trial, Candidate]]] = {}
        self._budget = Budget(**self.study.user_attrs.get("budget", {}))
        self.study.set_user_attr("ended", None)
        self.display.trials(done, limits.trials, self.tally.standing, 0, 0.0)
        while not (ended := self._budget.ended(limits, done, images)) or self.pool.busy:
            while not ended and self.pool.free and done + self._running < limits.trials:
                trial, chosen = self._ask()
                if chosen.behaviour in self._measuring:
                    self._measuring[chosen.behaviour].append((trial, chosen))
                    continue
                if chosen.behaviour in self._known:
                    self._tell_known(trial, chosen)
                    done += 1
                    ended = self._budget.ended(limits, done, images)
                    continue
                # known points are wanted whole: anchors are confirmed whatever they score, and one bad picture among
                # the first must not end what is tried for a reason
                races = not {"anchor", "origin"} & trial.user_attrs.keys()
                latency = self.unmodified.latency(chosen)
                self._measuring[chosen.behaviour] = []
                self._draw(Entry(trial, chosen, latency, iter(self.unmodified.rounds), races))
            if not self.pool.busy:
                continue
            for job in self.pool.wait(timeout=1.0):
                images += len(job.result.images) if job.result is not None else 0
                if self._tell(job):
                    done += 1 + self._tell_same(job.tag)
            self.display.tick()
        self.study.set_user_attr("ended", ended)
        self._storage.write()
        self.display.say(f"the search ends at {ended}")

    @property
    def _running(self) -> int:
        """Trials that have not finished."""
        return sum(1 + len(same) for same in self._measuring.values())

    def _draw(self, entry: Entry) -> None:
        """The pictures of the next round, on the next free worker."""
        asked = entry.chosen, "search", self.unmodified.images, next(entry.rounds), entry.images
        job = Job("measure", asked, entry)
        self.pool.submit(job)
        self._note_worker(job)
        self._storage.write()

    def _note_worker(self, job: Job) -> None:
        """Which worker has or had a job; one that waits has none yet, and a death may hand it to another."""
        trial = job.tag.trial
        if job.attempts and trial.user_attrs.get("worker") != job.worker:
            trial.set_user_attr("worker", job.worker)

    def _outside(self, params: dict[str, Any]) -> bool:
        """Whether an anchor lies outside of the space: its sampler must not learn from it."""
        return params["steps"] not in steps_of(self.config)

    def _near(self) -> dict[str, Any] | None:
        """Every so often a neighbour of the front is tried, once no known point waits: a sampler rarely meets one."""
        search, trials = self.config.search, self.study.get_trials(deepcopy=False)
        rng = np.random.default_rng((search.seed, len(trials)))
        if rng.random() >= search.refine or self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        params = {t.user_attrs["key"]: t.params for t in self._known.values()}
        members = [params[point.key] for point in self.tally.front if params[point.key]]
        return self._around.near(members, self._known.keys() | self._measuring.keys(), rng)

    def _ask(self) -> tuple[optuna.Trial, Candidate]:
        with given(self.study, self._near()):
            trial = self.study.ask()
            known = self._anchors.get(trial.user_attrs.get("anchor", ""))
            params = known if known and self._outside(known) else suggest(trial, self._space)
        if trial.params:
            join_population(self.study, trial)
        chosen = candidate(params, self.config, self.model, f"trial {trial.number}")
        trial.set_user_attr("key", chosen.key)
        trial.set_user_attr("steps", chosen.steps)
        if chosen.guidance_scale is not None:
            trial.set_user_attr("guidance_scale", chosen.guidance_scale)
        trial.set_user_attr("policy", chosen.policy.model_dump(mode="json", exclude_none=True))
        return trial, chosen

    def _tell_known(self, trial: optuna.Trial, chosen: Candidate) -> None:
        """The same behaviour spelled otherwise is one policy: its scores stand, and its key."""
        known = self._known[chosen.behaviour]
        trial.set_user_attr("same_as", known.number)
        trial.set_user_attr("key", known.user_attrs["key"])
        if "dropped" in known.user_attrs:
            trial.set_user_attr("dropped", True)
        for name, excess in known.constraints.items():
            trial.set_constraint(name, excess)
        unspent = {"images": 0.0, "generate_seconds": 0.0, "score_seconds": 0.0, "steps_saved": 1.0}
        trial.set_user_attr("metrics", known.user_attrs["metrics"] | unspent)
        self._after(self._close(trial))

    def _tell_same(self, entry: Entry) -> int:
        """A trial has ended: so have those that waited for it, being the same. How many."""
        same = self._measuring.pop(entry.chosen.behaviour)
        for trial, chosen in same:
            if chosen.behaviour in self._known:
                self._tell_known(trial, chosen)
            else:
                trial.set_user_attr("reason", entry.trial.user_attrs["reason"])
                self._after(self._close(trial))
        return len(same)

    def _close(self, trial: optuna.Trial | FrozenTrial) -> FrozenTrial:
        """Tell MLflow, then Optuna, what the attributes of `trial` say; after a kill in between, both again."""
        self._storage.write()
        told = trial.user_attrs
        policy, metrics, reason = BlockPolicy.model_validate(told["policy"]), told.get("metrics"), told.get("reason")
        self.tracker.trial(trial.number, trial.datetime_start, trial.params, metrics or {}, policy, reason)
        if metrics is None:
            return self.study.tell(trial.number, state=TrialState.FAIL)
        objectives = self.config.objectives
        return self.study.tell(
            trial.number, [metrics[objectives.alignment], metrics[objectives.quality], metrics["latency"]]
        )

    def _tell(self, job: Job) -> bool:
        """Take in what a job measured; whether that ended its trial."""
        entry: Entry = job.tag
        trial, chosen = entry.trial, entry.chosen
        self._note_worker(job)
        reason = job.error
        if job.result is not None:
            entry.add(job.result)
            reason = entry.not_finite()
        if reason:
            trial.set_user_attr("reason", reason)
            closed = self._close(trial)
            self.display.say(f"trial {trial.number} failed: {reason}")
            self._after(closed)
            return True
        seen, latency = entry.images, entry.latency
        against = self.config.constraints, self.unmodified.scores, latency / self.baseline.latency
        differences, dropped = self.unmodified.differences(entry.scores), seen < len(self.prompts)
        hopes = max(entry.certain(*against).values()) <= 0
        if dropped and (not entry.races or (hopes and self._race.goes_on(differences, latency))):
            self._draw(entry)
            return False
        metrics = entry.means(self.unmodified.scores) | {
            "latency": latency,
            "transformer_latency": self.unmodified.transformer_latency(chosen),
            "speedup": self.baseline.latency / latency,
            "images": float(seen),
            "generate_seconds": entry.generate_seconds,
            "score_seconds": entry.score_seconds,
            "steps_saved": entry.steps_saved,
        }
        if self.config.constraints.max_cache_gib is not None:
            metrics["cache_gib"] = entry.cache_bytes / 2**30
        self.run.write_scores(f"trial-{trial.number:04d}", self.prompts[:seen], entry.scores)
        broken = entry.excesses(*against)
        for name, excess in broken.items():
            trial.set_constraint(name, excess)
        if dropped:
            trial.set_user_attr("dropped", True)
        elif max(broken.values()) <= 0:
            self._race.finish(differences, latency)
        trial.set_user_attr("metrics", metrics)
        closed = self._close(trial)
        self._known.setdefault(chosen.behaviour, closed)
        self._after(closed, seen, entry.generate_seconds)
        return True

    def _allow(self) -> None:
        """How long a worker may be silent, by what pictures took so far."""
        if images := self.tally.spent["images"]:
            self.pool.expect(self._largest, self.tally.spent["worker_seconds"] / images)

    def _after(self, closed: FrozenTrial, images: int = 0, seconds: float = 0.0) -> None:
        """A trial has finished, with so many pictures in so many seconds of drawing."""
        self.tally.add(closed)
        standing, done, spent = self.tally.standing, self.tally.finished, self.tally.spent
        self.study.set_user_attr("budget", self._budget.trial(done, standing.get("hypervolume", 0.0)))
        self._allow()
        on_gpus = {"gpu_seconds": spent["worker_seconds"] * self.pool.gpus} if self.pool.gpus else {}
        self.tracker.progress(closed.number, standing | spent | on_gpus)
        self.display.trials(done, self.config.search.trials, standing, images, seconds)

    def front_table(self) -> list[dict[str, Any]]:
        """The front as rows for a person, fastest first."""
        return [
            {"candidate": p.name, "steps": p.steps, **guidance_column(p, self.config),
             "alignment": p.alignment, "quality": p.quality,
             "latency": p.latency, "speedup": self.baseline.latency / p.latency, "key": p.key[:16]}
            for p in self.tally.front
        ]  # fmt: skip

    def differences(self, trial: FrozenTrial) -> np.ndarray:
        """Alignment and quality less the unmodified model's, in shares of 100 points, as `(pictures, 2)`."""
        number = trial.user_attrs.get("same_as", trial.number)
        return self.unmodified.differences(self.run.read_scores(f"trial-{number:04d}"))
