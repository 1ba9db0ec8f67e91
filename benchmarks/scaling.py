"""Trials per hour on 1, 2, 4 … GPUs of one host: python -m benchmarks.scaling --workers 1 2 4 --kill

The same search with more and more workers, one GPU each: of the bundled model, and of SD3.5-Large at its full size with
random weights, few steps and scores that need no weights. Proposals are random, without race and shared steps, so that
every search measures the same candidates at the same cost. Of each model the most workers are started at once, every
one makes all pictures once, unmeasured, and a search uses the first so many; the others rest. The study, the records
in MLflow and the pool are the product's own; there is no confirm.

Rates are over the time from the first trial's start to the last one's end. A search this short ends with workers for
whom no trial is left, which one of hundreds of trials hardly has: `until the end` counts each worker's trials over the
time until its last. What is lost against one worker is told by where the workers' time went, which adds up.

`--kill`: one search more of the first model, amid which a worker is killed; all trials must finish, each once.
Without a GPU workers are processes of one CPU core each; `--size tiny` tries it there, and its figures say nothing.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import blocktune.search.pool
import mlflow
import optuna
import psutil
import ray
import torch
from blocktune.policies import BlockPolicy
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config, load_config
from blocktune.search.pool import Job, Pool
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from blocktune.search.study import Study, check_objectives
from blocktune.search.tracking import Record, Tracker
from blocktune.search.worker import Worker
from optuna.trial import TrialState

from .full_size import EXAMPLES, TINY, Noting, RandomWeights
from .scaling_report import compare, draw, report, split

RESULTS = Path(__file__).parent / "results" / "scaling"
EQUAL = ["search.sampler=random", "search.racing=false", "ray.prefix_gib=0"]
MODELS = {
    "reference": ["generation.batch=96"],
    "sd3.5-large": [
        "prompts.search_images=1", "generation.num_inference_steps=4", "space.anchor_steps=[3]", "model.dtype=bfloat16",
        "objectives.alignment=ssim", "objectives.quality=psnr", "objectives.reported=[]",
    ],
}  # fmt: skip
SMALL = {
    "reference": [
        "generation.num_inference_steps=4", "generation.batch=2", "space.anchor_steps=[3]", "prompts.search_images=2",
        "objectives.reported=[]", "model.dtype=float32",
    ],
    "sd3.5-large": [*TINY, "model.dtype=float32"],
}  # fmt: skip
TRIALS = {"full": 24, "tiny": 8}


def config_of(model: str, size: str, trials: int) -> Config:
    example = None if model == "reference" else EXAMPLES / f"{model}.yaml"
    small = SMALL[model] if size == "tiny" else []
    return load_config(example, [*MODELS[model], *small, *EQUAL, f"search.trials={trials}"])


class TimedTracker(Tracker):
    """Notes what recording takes: wall seconds of the search's thread, CPU seconds of the one that sends."""

    said, sent = 0.0, 0.0

    def trial(self, *args: Any) -> None:
        began = time.perf_counter()
        super().trial(*args)
        self.said += time.perf_counter() - began

    def progress(self, *args: Any) -> None:
        began = time.perf_counter()
        super().progress(*args)
        self.said += time.perf_counter() - began

    def _delivered(self, record: Record) -> bool:
        began = time.thread_time()
        try:
            return super()._delivered(record)
        finally:
            self.sent += (time.thread_time() - began) * (record.trial is not None or bool(record.metrics))


class TimedPool(Pool):
    """Notes for how many seconds the search's thread had nothing to do but wait for its workers."""

    waited = 0.0

    def wait(self, timeout: float = 1.0) -> list[Job]:
        began = time.perf_counter()
        jobs = super().wait(timeout)
        self.waited += time.perf_counter() - began
        return jobs


class Watcher:
    """Beside a search: the driver's memory and, with `kill_after` measurements, the death of a worker amid the next."""

    def __init__(self, notes: Path, kill_after: int | None):
        self.notes, self.kill_after = notes, kill_after
        self.known = len(read_notes(notes))
        self.main_gib, self.killed = 0.0, None
        self._over, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._over.wait(0.02):
            self.main_gib = max(self.main_gib, driver.memory_info().rss / 2**30)
            if self.kill_after is None or self.killed is not None:
                continue
            noted = read_notes(self.notes)[self.known :]
            if len(noted) >= self.kill_after:
                self._kill([note["pid"] for note in noted])

    def _kill(self, pids: list[int]) -> None:
        """The first that Ray's title of its process says to measure."""
        for pid in pids:
            if ".measure" in psutil.Process(pid).cmdline()[0]:
                os.kill(pid, signal.SIGKILL)
                self.killed = pid
                return


def read_notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Host:
    """The workers of one model, as many as any of its searches uses, all resident and warm."""

    def __init__(self, model: str, size: str, trials: int, workers: int, folder: Path, display: Display):
        config = config_of(model, size, trials)
        self.config = config.model_copy(update={"ray": config.ray.model_copy(update={"workers": workers})})
        check_objectives(self.config)
        self.model, self.folder, self.display, self.notes = model, folder, display, folder / "notes.jsonl"
        self.run = RunDirectory.open(folder / "run", self.config, resume=False)
        base, settings = (Noting, {}) if model == "reference" else (RandomWeights, {"example": model})
        # made here, so that it travels to the workers with its attributes and not as a name to import
        noting = type("NotingWorker", (base,), {"notes": self.notes, "tiny": size == "tiny", **settings})
        blocktune.search.pool.Worker = noting
        try:
            self.pool = TimedPool(self.config)
        finally:
            blocktune.search.pool.Worker = Worker
        plain = BlockPolicy(name="unmodified", model=self.pool.description.model, rules=())
        steps = self.config.generation.num_inference_steps
        self.pool.run([Job("measure", (Candidate(plain, steps), "search", None)) for _ in range(workers)])

    def search(self, workers: int, kill: bool = False) -> dict[str, Any]:
        """The search on the first so many workers; what it took, and what must hold."""
        began, wanted = time.monotonic(), self.config.search.trials
        name = f"{self.model} on {workers}{', one killed' if kill else ''}"
        self.display.say(name)
        storage = f"sqlite:///{self.folder.absolute() / f'{name}.db'}"
        limits = self.config.search.model_copy(update={"storage": storage})
        config = self.config.model_copy(update={"name": name.translate({32: "-", 44: None}), "search": limits})
        self.pool._idle = self.pool._workers[:workers]
        tracker = TimedTracker(config, self.run.path, name)
        tracker.begin({}, {"workers": workers}, {})
        study = Study(config, self.run, self.pool, tracker, self.display)
        assert tracker.run_id, "MLflow's database does not answer"  # it is made once, and that is no trial's time
        with Watcher(self.notes, wanted // 3 if kill else None) as watcher:
            before = [*self.pool._workers]
            self.pool.waited, process, thread = 0.0, time.process_time(), time.thread_time()
            study.search()
            process, thread = time.process_time() - process, time.thread_time() - thread
        tracker.finish("FINISHED")
        tracker.close()
        trials, noted = study.study.get_trials(), read_notes(self.notes)[watcher.known :]
        measured = [t for t in trials if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs]
        held = {"every trial finished, none more": len(trials) == wanted == sum(t.state.is_finished() for t in trials),
                "none failed": all(t.state == TrialState.COMPLETE for t in trials)}  # fmt: skip
        if kill:
            held |= {"a worker was killed amid a trial": watcher.killed is not None,
                     "another took its place":
                     sum(a is not b for a, b in zip(before, self.pool._workers, strict=True)) == 1}  # fmt: skip
        rates = split(measured, workers)
        return {
            "model": self.model, "workers": workers, "killed": kill, "trials": len(trials), "measured": len(measured),
            **rates, "wall_seconds": time.monotonic() - began,
            "driver": {
                "cpu_ms_per_trial": 1000 * process / wanted, "search_thread_cpu_ms_per_trial": 1000 * thread / wanted,
                "mlflow_said_ms_per_trial": 1000 * tracker.said / wanted,
                "mlflow_sent_cpu_ms_per_trial": 1000 * tracker.sent / wanted, "main_gib": watcher.main_gib,
                "search_thread_busy": 1 - self.pool.waited / rates["trials_seconds"],
            },
            "worker_main_gib": max(note["main_gib"] for note in noted),
            "worker_gpu_gib": max(note["peak_gib"] for note in noted),
            "keys": [t.user_attrs["key"] for t in trials if "key" in t.user_attrs], "held": held,
        }  # fmt: skip

    def close(self) -> None:
        self.pool.close()
        self.run.release()


def write(told: dict[str, Any], out: Path) -> None:
    """Compare what is there so far, and write it: a run that is cut short loses nothing."""
    for s in told["searches"]:
        of_model = [other for other in told["searches"] if other["model"] == s["model"]]
        s["held"]["the same candidates as the first"] = s["keys"] == of_model[0]["keys"]
        if of_model[0]["workers"] == 1 and not s["killed"]:
            s |= compare(of_model[0], s)
    name = "scaling" if told["size"] == "full" else f"scaling.{told['size']}"
    (out / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n")
    (out / f"{name}.md").write_text(report(told))
    draw(told, out / f"{name}.png")


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+",
                        default=[n for n in (1, 2, 4, 8) if n <= (gpus or os.cpu_count() or 1)])  # fmt: skip
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kill", action="store_true", help="one search more, amid which a worker is killed")
    parser.add_argument("--size", choices=TRIALS, default="full")
    parser.add_argument("--trials", type=int, help="of each search; more of them make its end a smaller share")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    workers, told = sorted(set(args.workers)), {"size": args.size, "unit": "GPU" if gpus else "CPU core"}
    told |= {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus, "start_seconds": {}, "searches": []}
    with Display() as display, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        for number, model in enumerate(args.model):
            folder, began = Path(place) / model, time.monotonic()
            folder.mkdir()
            host = Host(model, args.size, args.trials or TRIALS[args.size], workers[-1], folder, display)
            told["start_seconds"][model] = time.monotonic() - began
            on = host.pool.description
            told |= {"device": f"{on.device}, {on.dtype}", "seed": host.config.search.seed, "versions": on.versions
                     | {m.__name__: m.__version__ for m in (optuna, ray, mlflow)}}  # fmt: skip
            try:
                for count in workers:
                    told["searches"].append(host.search(count))
                    write(told, args.out)
                if args.kill and number == 0:
                    told["searches"].append(host.search(workers[-1], kill=True))
                    write(told, args.out)
            finally:
                host.close()
    print(report(told), flush=True)
    if not all(held for s in told["searches"] for held in s["held"].values()):
        sys.exit("a search lost or doubled trials: see BROKEN above")


if __name__ == "__main__":
    main()
