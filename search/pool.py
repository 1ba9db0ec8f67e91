"""Ray actors, each with a resident pipeline: start them, hand them work, replace those that die."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray
import ray.exceptions

from .config import Config, ConfigError
from .outputs import Outputs
from .scoring import Pictures
from .worker import Description, Worker

MOST_ON_CPUS = 8  # each holds a pipeline in memory
RETRIES = 1  # a job whose worker died is tried once more
AHEAD = 1  # so many candidates may wait for their scores while their worker draws another


class JobFailed(RuntimeError):
    """A job that must succeed did not."""


@dataclass
class Job:
    """One call of a worker's method, and how it ended."""

    method: str
    args: tuple[Any, ...]
    tag: Any = None
    result: Any = None
    error: str | None = None
    attempts: int = 0
    worker: int = 0  # the number of the one that has it or had it last


@dataclass
class _Work:
    """A job that a worker is at, or the pictures of one that its scorer is at."""

    worker: Any
    job: Job
    until: float  # when it is late
    pictures: Pictures | None = None
    made: float = 0.0  # when the pictures were
    drawn_on: float | None = None  # when its worker began the next

    @property
    def waited(self) -> float:
        """Seconds of its worker that its scores took: those in which nothing was drawn."""
        return (time.monotonic() if self.drawn_on is None else self.drawn_on) - self.made


class Pool:
    """Long-lived workers, one job each at a time, the next while a scorer beside is still at the last one's pictures.

    Ray's own retries are off: a poisonous job must not kill them all.
    """

    def __init__(self, config: Config, dtype: str | None = None):
        self.config = config
        self.limit = config.ray.timeout_s  # seconds of a job; None while nobody knows how long pictures take
        try:
            if config.ray.address:
                ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",  # not whatever cluster happens to run on this machine
                    include_dashboard=False,
                    object_store_memory=200 * 2**20,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"ray.address is {config.ray.address!r}: {' '.join(str(error).split())[:200]}") from None
        try:
            self._start(dtype)
        except BaseException:
            ray.shutdown()
            raise

    def _start(self, dtype: str | None) -> None:
        resources = ray.cluster_resources()
        gpus, beside = self.config.ray.gpus_per_worker, self.config.ray.evaluator_gpus or 0.0
        if gpus is None:
            gpus = 1.0 - beside if resources.get("GPU", 0) else 0.0
        self.gpus = gpus + beside  # each worker has, with its evaluators
        cpus = min(self.config.ray.cpus_per_worker, int(resources.get("CPU", 1)))
        room = int(resources.get("GPU", 0) / self.gpus) if self.gpus else int(resources.get("CPU", 1) // cpus)
        count = self.config.ray.workers or max(1, room if self.gpus else min(room, MOST_ON_CPUS))
        if count > room:
            raise ConfigError(
                f"ray.workers is {count}; the cluster has room for {room} (cpus_per_worker {cpus}, "
                f"GPUs {self.gpus:g} each)."
            )
        # SPREAD: one worker per node before a second on any
        self._actor = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        kept = self.config.ray.prefix_gib
        # begun anew, empty, where it dies: what it held is computed again
        self._outputs = ray.remote(Outputs).options(num_cpus=0, max_restarts=-1).remote(kept) if kept else None
        # CPUs whose faster dtype is still to be found time both of them, with nothing beside
        alone = dtype is None and self.config.model.dtype == "auto" and not self.gpus
        began = time.monotonic()
        self._workers = [self._begin(dtype) for _ in range(1 if alone else count)]  # by number; replaced in their place
        self.description: Description = self._described(self._workers[0])
        self._starting = time.monotonic() - began  # seconds
        self._workers += [self._begin(self.description.dtype) for _ in range(count - len(self._workers))]
        self.nodes = [self._described(worker).node for worker in self._workers]
        self._idle = list(self._workers)
        self._waiting: list[Job] = []  # for a worker; none while one is idle
        self._work: dict[Any, _Work] = {}  # by what Ray gives when it is done, oldest first
        self._new: set[Any] = set(self._workers)  # those that still load, the pipeline or their evaluators

    def _begin(self, dtype: str | None) -> Any:
        return self._actor.remote(self.config, dtype, self._outputs)

    @staticmethod
    def _described(worker: Any) -> Description:
        try:
            return ray.get(worker.describe.remote())
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if hasattr(error, "cause") else error
            raise cause if isinstance(cause, ValueError) else error from None
        except ray.exceptions.ActorDiedError as error:
            text = str(error)
            if "ConfigError" in text:  # the constructor's own sentence lies at the end of Ray's report
                raise ConfigError(text.rsplit("ConfigError:", 1)[1].strip().splitlines()[0]) from None
            raise

    @property
    def size(self) -> int:
        return len({*self._idle, *(work.worker for work in self._work.values())})

    @property
    def free(self) -> int:
        """Workers that a job would not wait for."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Jobs that have not finished, those included whose pictures are being scored."""
        return len(self._work) + len(self._waiting)

    def put(self, value: Any) -> Any:
        """Share a large value with all workers; pass what comes back as an argument."""
        return ray.put(value)

    def expect(self, images: int, seconds: float) -> None:
        """What the largest job is to make, and how long each picture takes: whoever takes far longer hangs."""
        if self.config.ray.timeout_s is None:
            self.limit = 60 + 20 * images * seconds

    def submit(self, job: Job) -> None:
        """Hand `job` to a worker that is free, or to the next that will be."""
        self._waiting.append(job)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            worker, job, now = self._idle.pop(), self._waiting.pop(0), time.monotonic()
            for work in self._of(worker):
                work.drawn_on = now if work.drawn_on is None else work.drawn_on
            job.attempts, job.worker = job.attempts + 1, self._workers.index(worker)
            reference = getattr(worker, job.method).remote(*job.args)
            self._work[reference] = _Work(worker, job, self._until(worker))

    def _of(self, worker: Any) -> list[_Work]:
        return [work for work in self._work.values() if work.worker is worker]

    def _until(self, worker: Any) -> float:
        loading = 3 * self._starting if worker in self._new else 0.0
        return math.inf if self.limit is None else time.monotonic() + self.limit + loading

    def wait(self, timeout: float = 1.0) -> list[Job]:
        """Finished jobs; none after `timeout` seconds. One whose worker died or hung goes on its replacement."""
        ready, others = ray.wait(list(self._work), timeout=timeout)
        late = [reference for reference in others if time.monotonic() > self._work[reference].until]
        finished = [job for reference in [*ready, *late] for job in self._taken(reference, reference in late)]
        self._hand_out()
        return finished

    def _taken(self, reference: Any, late: bool) -> list[Job]:
        """The job behind `reference`, where that finished it."""
        if reference not in self._work:  # lost meanwhile, with another of its worker's
            return []
        work = self._work[reference]
        worker, job, pictures = work.worker, work.job, work.pictures
        if late:
            return self._lost(work, f"took more than {self.limit:.3g} s,")
        try:
            result = ray.get(reference) if pictures is None else pictures.measured(work.waited)
        except ray.exceptions.RayTaskError as error:
            result, job.error = None, " ".join(str(error.cause).split())[:300] or type(error.cause).__name__
        except ray.exceptions.RayActorError:  # the worker or its scorer, by the first that it was at
            return self._lost(next(w for w in self._of(worker) if (w.pictures is None) == (pictures is None)), "died")
        except ray.exceptions.ObjectLostError:  # scores are their worker's: it died, by what it drew meanwhile
            return self._lost(next((w for w in self._of(worker) if w.pictures is None), work), "died")
        del self._work[reference]
        others = self._of(worker)
        if isinstance(result, Pictures):
            until = math.inf if others else self._until(worker)  # its scorer is at another before
            self._work[result.last] = _Work(worker, job, until, result, time.monotonic())
        else:
            job.result = result
            self._new.discard(worker)
            if pictures is not None and others and others[0].pictures is not None:
                others[0].until = self._until(worker)
        works = self._of(worker)
        draws = any(w.pictures is None for w in works)
        if not draws and len(works) <= AHEAD and worker not in self._idle:
            self._idle.append(worker)
        return [] if isinstance(result, Pictures) else [job]

    def _lost(self, work: _Work, how: str) -> list[Job]:
        """Replace the worker of `work`; what else it and its scorer were at is not to blame, and goes on as well."""
        worker, job = work.worker, work.job
        others = [other.job for other in self._of(worker) if other is not work]
        self._work = {reference: other for reference, other in self._work.items() if other.worker is not worker}
        # a new actor, not Ray's restart: calls to one that restarts fail at once instead of waiting for it
        ray.kill(worker)
        self._new.discard(worker)
        fresh = self._begin(self.description.dtype)
        self._workers[job.worker] = fresh
        self._new.add(fresh)
        self._idle = [fresh, *(idle for idle in self._idle if idle is not worker)]
        for other in others:
            other.attempts -= 1
        again = job.attempts <= RETRIES
        self._waiting[:0] = [job, *others] if again else others
        job.error = None if again else f"its worker {how} {job.attempts} times"
        return [] if again else [job]

    def run(self, jobs: list[Job], done: Callable[[Job], None] = lambda job: None) -> list[Job]:
        """All jobs, as many at a time as there are workers, in their order. JobFailed when one failed."""
        for job in self.try_all(jobs, done):
            raise JobFailed(f"{job.method} failed: {job.error}")
        return jobs

    def try_all(self, jobs: list[Job], done: Callable[[Job], None] = lambda job: None) -> list[Job]:
        """All jobs, as `run`; `done` is called for each that succeeded, and those that failed are given back."""
        failed = []
        for job in jobs:
            self.submit(job)
        while self.busy:
            for job in self.wait():
                if job.error:
                    failed.append(job)
                else:
                    done(job)
        return failed

    def close(self) -> None:
        ray.shutdown()
