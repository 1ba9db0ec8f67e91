"""What logging to MLflow costs a search: python benchmarks/records.py RUN_DIR [--trials 1000] [--store sqlite server]

Synthetic trials go through the real tracker to a real store: SQLite, and a tracking server on this machine. Told per
trial: seconds that the search's thread waits, and CPU seconds of the thread that sends and of the server, which a
search whose workers run on the same CPUs pays too. Both as shares of what a trial took in RUN_DIR, a finished run:
the wait against the wall time between trials, the CPU against the seconds of a worker.

Not covered: artifacts and pictures of the end, which are sent once, and a server across a network, which costs the
search's thread nothing and takes no CPU here.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
from blocktune.policies import BlockPolicy
from blocktune.search.config import load_config
from blocktune.search.storage import STUDY
from blocktune.search.tracking import Tracker
from optuna.trial import TrialState

LIMIT = 0.02  # of a trial


def measured_trials(run: Path) -> tuple[list[Any], dict[str, Any], float, float]:
    """The run's trials that were measured, what it ran on, and seconds per trial: of a worker, and of wall time."""
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{(run / 'study.db').absolute()}")
    trials: list[Any] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [t for t in trials if "same_as" not in t.user_attrs]
    spent = sum(t.user_attrs["metrics"]["generate_seconds"] + t.user_attrs["metrics"]["score_seconds"] for t in trials)
    wall = (max(t.datetime_complete for t in trials) - min(t.datetime_start for t in trials)).total_seconds()
    return trials, study.user_attrs["description"], spent / len(trials), wall / len(trials)


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A tracking server on this machine, and its first process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "kept"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", psutil.Process(started.pid)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and all below it."""
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def log_trials(uri: str, folder: Path, trials: list[Any], count: int, other: psutil.Process | None) -> dict[str, float]:
    """Seconds per trial: the search's wait, all CPU, and the time until everything had arrived."""
    tracker = Tracker(load_config(None, [f"mlflow.uri={uri}"]), folder, "benchmark")
    tracker.progress(0, {})
    assert tracker.run_id, "the store does not answer"  # the import of MLflow and a new database are paid once
    before, began, waited = cpu(psutil.Process()) + (cpu(other) if other else 0.0), time.perf_counter(), 0.0
    for number in range(count):
        like = trials[number % len(trials)]
        metrics, policy = like.user_attrs["metrics"], BlockPolicy.model_validate(like.user_attrs["policy"])
        standing = {f"standing_{i}": number / (i + 1) for i in range(9)}
        said = time.perf_counter()
        tracker.trial(number, datetime.now(), like.params, metrics, policy, None)
        tracker.progress(number, standing)
        waited += time.perf_counter() - said
    tracker.close()
    assert not (folder / "outbox.jsonl").exists(), "not every record was sent"
    after = cpu(psutil.Process()) + (cpu(other) if other else 0.0)
    return {"wait": waited / count, "cpu": (after - before) / count, "sent": (time.perf_counter() - began) / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, whose trials are taken as pattern and measure")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--store", nargs="+", choices=("sqlite", "server"), default=["sqlite", "server"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "records.json")
    args = parser.parse_args()
    trials, on, worker, wall = measured_trials(args.run)
    print(f"a trial of {args.run.name}: {worker:.2f} s of a worker, {wall:.2f} s of wall time with {on['workers']}")
    result: dict[str, Any] = {
        "trials": args.trials, "machine": platform.machine(), "cpus": os.cpu_count(), "mlflow": mlflow.__version__,
        "searched_on": on["device"], "trial_worker_seconds": worker, "trial_wall_seconds": wall, "limit": LIMIT,
    }  # fmt: skip
    for store in args.store:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if store == "sqlite":
                told = log_trials(f"sqlite:///{folder / 'mlflow.db'}", folder, trials, args.trials, None)
            else:
                with server(folder) as (uri, process):
                    told = log_trials(uri, folder, trials, args.trials, process)
        shares = {"wait": told["wait"] / wall, "cpu": told["cpu"] / worker}
        held = max(shares.values()) <= LIMIT
        result[store] = {"seconds_per_trial": told, "shares": shares, "held": held}
        print(
            f"{store:<8} wait {1e3 * told['wait']:7.2f} ms ({shares['wait']:.3%})   CPU {1e3 * told['cpu']:7.2f} ms "
            f"({shares['cpu']:.3%})   sent after {1e3 * told['sent']:7.2f} ms   limit {LIMIT:.0%}  "
            f"{'ok' if held else 'MISSED'}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
