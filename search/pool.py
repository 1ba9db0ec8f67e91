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
from .worker import Description, Worker

MOST_ON_CPUS = 8  # each holds a pipeline in memory
RETRIES = 1  # a job whose worker died is tried once more


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


class Pool:
    """Long-lived workers, one job each at a time. Ray's own retries are off: a poisonous job must not kill them all."""

    def __init__(self, config: Config, dtype: str | None = None):
        self.config = config
        self.limit = config.ray.timeout_s  # seconds of a job; whoever knows how long pictures take may set it
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
        began = time.monotonic()
        first = self._actor.remote(self.config, dtype)
        self.description: Description = self._described(first)  # settles the dtype for all
        self._starting = time.monotonic() - began  # seconds
        rest = [self._actor.remote(self.config, self.description.dtype) for _ in range(count - 1)]
        self.nodes = [self.description.node] + [self._described(worker).node for worker in rest]
        self._workers = [first, *rest]  # by number; one that dies is replaced in its place
        self._idle = list(self._workers)
        self._running: dict[Any, tuple[Any, Job, float]] = {}  # until when it may take
        self._new: set[Any] = {first, *rest}  # those that still load, the pipeline or their evaluators

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
        return len(self._idle) + len(self._running)

    @property
    def free(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._running)

    def put(self, value: Any) -> Any:
        """Share a large value with all workers; pass what comes back as an argument."""
        return ray.put(value)

    def submit(self, job: Job) -> None:
        worker = self._idle.pop()
        job.attempts, job.worker = job.attempts + 1, self._workers.index(worker)
        reference = getattr(worker, job.method).remote(*job.args)
        loading = 3 * self._starting if worker in self._new else 0.0
        until = math.inf if self.limit is None else time.monotonic() + self.limit + loading
        self._running[reference] = (worker, job, until)

    def wait(self, timeout: float = 1.0) -> list[Job]:
        """Finished jobs; none after `timeout` seconds. One whose worker died or hung goes on its replacement."""
        ready, others = ray.wait(list(self._running), timeout=timeout)
        late = [reference for reference in others if time.monotonic() > self._running[reference][2]]
        finished = []
        for reference in [*ready, *late]:
            worker, job, _ = self._running.pop(reference)
            lost = f"took more than {self.limit:.0f} s," if reference in late else None
            try:
                if not lost:
                    job.result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                job.error = " ".join(str(error.cause).split())[:300] or type(error.cause).__name__
            except ray.exceptions.RayActorError:
                lost = "died"
            if lost:
                # a new actor, not Ray's restart: calls to one that restarts fail at once instead of waiting for it
                ray.kill(worker)
                self._new.discard(worker)
                worker = self._actor.remote(self.config, self.description.dtype)
                self._workers[job.worker] = worker
                self._new.add(worker)
                if job.attempts <= RETRIES:
                    self._idle.append(worker)
                    self.submit(job)
                    continue
                job.error = f"its worker {lost} {job.attempts} times"
            else:
                self._new.discard(worker)
            self._idle.append(worker)
            finished.append(job)
        return finished

    def run(self, jobs: list[Job], done: Callable[[Job], None] = lambda job: None) -> list[Job]:
        """All jobs, as many at a time as there are workers, in their order. JobFailed when one failed."""
        for job in self.try_all(jobs, done):
            raise JobFailed(f"{job.method} failed: {job.error}")
        return jobs

    def try_all(self, jobs: list[Job], done: Callable[[Job], None] = lambda job: None) -> list[Job]:
        """All jobs, as `run`; `done` is called for each that succeeded, and those that failed are given back."""
        waiting, failed = list(jobs), []
        while waiting or self._running:
            while waiting and self._idle:
                self.submit(waiting.pop(0))
            for job in self.wait():
                if job.error:
                    failed.append(job)
                else:
                    done(job)
        return failed

    def close(self) -> None:
        ray.shutdown()
