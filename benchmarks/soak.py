"""A long search among kills, and what the driver itself takes: python benchmarks/soak.py [--trials 300] [--driver 1000]

The soak: a search of a tiny untrained model in a process of its own, two workers, one of which is killed every 20 s of
searching; the driver with all its processes is killed twice and resumed. At the end every wanted trial has finished,
each that had finished before a kill is as it was, none was run twice, and MLflow holds each once.

The driver: the real study, tracker and SQLite, with a pool that answers at once, as if a picture took no time, and
whose scores leave as many on the front, and repeat as many, as real searches do; with each sampler. Told are
milliseconds of CPU time per trial, of the whole process, among the last hundred trials, to which the limit applies, and
from the first to the last; and of the last hundred what the search's thread takes, the sampler in it, and the thread
that sends to MLflow.
"""

import argparse
import json
import os
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import optuna
import psutil
import torch
from blocktune.evaluators import CostTable
from blocktune.policies.policy import ModelIdentity
from blocktune.reference.pipeline import new_pipeline
from blocktune.search.config import Config, load_config
from blocktune.search.pool import Job
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from blocktune.search.storage import STUDY
from blocktune.search.study import Study
from blocktune.search.tracking import Tracker
from blocktune.search.worker import Description, Measurement
from optuna.trial import FrozenTrial, TrialState

LIMIT_MS = 50.0  # of the driver, per trial
SAMPLERS = ("nsgaii", "tpe", "random")  # GP takes minutes to propose what others draw in one
KILL_EVERY = 20.0  # seconds between the deaths of workers
SETTINGS = [
    "generation.num_inference_steps=8", "generation.batch=12", "prompts.search_images=36", "prompts.confirm_images=12",
    "space.anchor_steps=[6]", "confirm.candidates=2", "confirm.repeats=1", "ray.workers=2", "model.dtype=float32",
]  # fmt: skip


def trials_of(run: Path) -> list[FrozenTrial]:
    if not (run / "study.db").exists():
        return []
    try:
        return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{run / 'study.db'}").get_trials()
    except KeyError:  # not created yet
        return []


def finished(trials: list[FrozenTrial]) -> dict[int, tuple[Any, ...]]:
    """Trials that count, by number: complete, or failed for a reason of their own."""
    ended = [t for t in trials if t.state == TrialState.COMPLETE or "reason" in t.user_attrs]
    return {t.number: (t.state, t.values, t.params, t.datetime_complete) for t in ended if t.state.is_finished()}


class Search:
    """The search as a process, its workers and its deaths."""

    def __init__(self, folder: Path, settings: list[str]):
        self.run, self.folder, self.settings = folder / "run", folder, settings
        self.workers_killed = 0

    def start(self) -> None:
        resume = ["--resume"] if (self.run / "config.yaml").exists() else []
        overrides = [word for setting in self.settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "blocktune.search", "search", "--out", str(self.run), *resume, *overrides]
        with (self.folder / "log.txt").open("ab") as log:
            self.driver = psutil.Popen(
                command, cwd=self.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def kill_a_worker(self) -> None:
        workers = []
        for process in self.driver.children(recursive=True):
            try:
                workers += [process] if "ray::Worker" in " ".join(process.cmdline()) else []
            except psutil.Error:
                continue  # it has just ended
        if workers:
            random.choice(workers).kill()
            self.workers_killed += 1

    def kill(self) -> None:
        """The driver and Ray's processes, as a power cut would."""
        family = self.driver.children(recursive=True)
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait(30)
        psutil.wait_procs(family, timeout=60)


def soak(trials: int) -> dict[str, Any]:
    """Seconds, kills, and whether what must hold did."""
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        new_pipeline().save_pretrained(str(folder / "model"))
        search = Search(folder, [*SETTINGS, f"model.path={folder / 'model'}", f"search.trials={trials}"])
        snapshots: list[dict[int, tuple[Any, ...]]] = []
        began = last = time.monotonic()
        known = 0  # trials that had finished when the driver was started
        search.start()
        while search.driver.poll() is None:
            time.sleep(1)
            seen = finished(trials_of(search.run))
            if len(snapshots) < 2 and len(seen) >= trials * (len(snapshots) + 1) // 3:
                search.kill()
                snapshots.append(finished(trials_of(search.run)))
                known = len(snapshots[-1])
                print(f"{time.monotonic() - began:5.0f} s  driver killed at {known} trials", flush=True)
                search.start()
            elif len(seen) == known:  # it still begins, and without workers it would not
                last = time.monotonic()
            elif time.monotonic() - last > KILL_EVERY:
                search.kill_a_worker()
                last = time.monotonic()
        seconds = time.monotonic() - began
        code = search.driver.wait()
        ended = trials_of(search.run)
        at_end = finished(ended)
        with sqlite3.connect(search.run / "mlflow.db") as database:
            recorded = [
                int(row[0])
                for row in database.execute(
                    "select n.value from runs r join tags n on n.run_uuid = r.run_uuid and n.key = 'trial'"
                    " where r.status in ('FINISHED', 'FAILED')"
                )
            ]
        retries = [t.user_attrs["retry_of"] for t in ended if "retry_of" in t.user_attrs]
        scored = {path.stem for path in (search.run / "scores").glob("trial-*.parquet")}
        measured = [t for t in ended if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs]
        held = {
            "the search ended well": code == 0,
            "every wanted trial finished": len(at_end) == trials,
            "what had finished is unchanged": all(snapshot.items() <= at_end.items() for snapshot in snapshots),
            "nothing is left running": not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in ended),
            "nothing interrupted ran twice": len(retries) == len(set(retries)) and not set(retries) & set(at_end),
            "MLflow holds each once": sorted(n for n in recorded if n in at_end) == sorted(at_end),
            "every measured trial has its scores": {f"trial-{t.number:04d}" for t in measured} <= scored,
        }
        if not all(held.values()):
            print(f"recorded {sorted(recorded)}", f"ended {sorted(at_end)}", (folder / "log.txt").read_text()[-8000:])
    return {
        "trials": trials, "seconds": seconds, "drivers_killed": len(snapshots), "workers_killed": search.workers_killed,
        "interrupted": len(retries), "failed": sum(t.state == TrialState.FAIL for t in ended if t.number in at_end),
        "distinct": len(measured), "held": held,
    }  # fmt: skip


class InstantPool:
    """Answers at once, with random scores that fall with the speed of a policy; what a study asks, and no more."""

    size, gpus = 1, 0.0

    def __init__(self, config: Config, model: ModelIdentity, costs: CostTable, images: int):
        self.description = Description(model, "", 8, 8, "float32", "none", "", {})
        self.costs, self.images, self.rng, self._jobs = costs, images, np.random.default_rng(0), []
        # a candidate comes in some rounds, and this is not the driver's work
        self.faster = cache(lambda policy, steps: 1 - costs.predict_policy(policy, steps) / costs.run_seconds)
        objectives = config.objectives
        self.names = (objectives.alignment, objectives.quality, *objectives.reported)

    @property
    def busy(self) -> int:
        return len(self._jobs)

    @property
    def free(self) -> int:
        return self.size - self.busy

    def put(self, value: Any) -> Any:
        return value

    def expect(self, images: int, seconds: float) -> None:
        pass

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float | None = None) -> list[Job]:
        jobs, self._jobs = self._jobs, []
        return self.run(jobs)

    def run(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            chosen, (end, start) = job.args[0], job.args[3:] or (self.images, 0)
            loss = 0.1 * self.faster(chosen.policy, chosen.steps) ** 2
            scores = {name: self.rng.normal(0.7 - loss, 0.05, end - start) for name in self.names}
            pictures = np.zeros((end - start, 8, 8, 3), np.uint8)
            job.result = Measurement(scores | {"sane": np.ones(end - start)}, pictures, 0.0, 0.0, 0.0)
        return jobs


def free(blocks: int) -> CostTable:
    """Of a model that nobody runs: every block takes as long, and nothing is known of the device."""
    parts = {"step_overhead": 0.1, "run_overhead": 0.1, "run_seconds": 20 * (0.1 + 0.01 * blocks) + 0.1}
    sizes = {"steps": 20, "repeats": 1, "batch": 24, "rows": 48, "height": 8, "width": 8, "threads": 1}
    return CostTable(
        block_compute=(0.01,) * blocks, block_reuse=(0.0001,) * blocks, device="none", dtype="float32", **parts,
        **sizes,
    )  # fmt: skip


def driver(trials: int, sampler: str) -> dict[str, Any]:
    """Milliseconds per trial of the driver's process, over the last hundred of `trials` and over all of them."""
    config = load_config(None, [f"search.trials={trials}", f"search.sampler={sampler}"])
    blocks, asked, marks = 38, [], []
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=blocks, fingerprint="0" * 64)
    with tempfile.TemporaryDirectory() as place, Display() as display:
        run = RunDirectory.open(Path(place) / "run", config, resume=False)
        costs = free(blocks)
        run.write_text(run.path / "cost_table.json", costs.model_dump_json())
        pool: Any = InstantPool(config, model, costs, config.prompts.search_images)
        tracker = Tracker(config, run.path, "benchmark")
        study = Study(config, run, pool, tracker, display)
        ask, after = study._ask, study._after

        def timed_ask() -> Any:
            began = time.thread_time()
            answer = ask()
            asked.append(time.thread_time() - began)
            return answer

        def mark() -> None:
            """When MLflow has all that it was told of: its thread's work belongs to the trials that were before."""
            while tracker._unsent:
                time.sleep(0.01)
            marks.append((time.process_time(), time.thread_time()))

        def marked_after(closed: FrozenTrial, images: int = 0, seconds: float = 0.0) -> None:
            after(closed, images, seconds)
            if study.tally.finished in (trials - 100, trials):
                mark()

        study._ask, study._after = timed_ask, marked_after
        mark()
        study.search()
        same = sum("same_as" in trial.user_attrs for trial in study.study.get_trials(deepcopy=False))
        tracker.close()
        run.release()
    process, thread = np.diff(1000 * np.array(marks), axis=0).T  # up to the last hundred, and in it
    last, mean_of_all = process[1] / 100, process.sum() / trials
    return {
        "trials": trials, "measured_before": same, "front": len(study.tally.front),
        "cpu_ms_per_trial": last, "of_which_search_thread_ms": thread[1] / 100,
        "of_which_sampler_ms": 1000 * mean(asked[-100:]), "of_which_mlflow_thread_ms": (process - thread)[1] / 100,
        "cpu_ms_per_trial_from_the_first": mean_of_all, "limit_ms": LIMIT_MS, "held": bool(last <= LIMIT_MS),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="of the soak; 0 leaves it out")
    parser.add_argument("--driver", type=int, default=1000, help="trials of the driver's measurement; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {"machine": platform.machine(), "cpus": os.cpu_count(), "optuna": optuna.__version__}
    measured = {f"driver, {sampler}": partial(driver, args.driver, sampler) for sampler in SAMPLERS if args.driver}
    measured |= {"soak": partial(soak, args.trials)} if args.trials else {}
    for name, measure in measured.items():
        result[name] = measure()
        print(json.dumps({name: result[name]}, indent=2), flush=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
