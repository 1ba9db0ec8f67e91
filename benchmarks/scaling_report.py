"""What searches with more and more workers tell: rates, where the workers' time went, a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial

GOAL = 0.95  # efficiency below which is told what was lost to what
PARTS = {
    "generating": "making pictures",
    "scoring": "scoring",
    "handing": "from asking to telling, less these two",
    "between": "from one trial's end to the next one's start",
    "end": "no trial left",
}
DRIVER = ("cpu", "search_thread_cpu", "mlflow_said", "mlflow_sent_cpu")  # milliseconds per trial
RATES = ("trials/h", "efficiency", "until the end", "pictures/s", "trials s", "wall s")


def split(trials: Sequence[FrozenTrial], workers: int) -> dict[str, Any]:
    """Where all workers' time went, in seconds per trial by part, and two rates in trials per hour."""
    began, ended = _start(min(trials, key=_start)), _end(max(trials, key=_end))
    parts, until_the_end = dict.fromkeys(PARTS, 0.0), 0.0
    for worker in range(workers):
        free = began
        own = sorted((t for t in trials if t.user_attrs["worker"] == worker), key=_start)
        for trial in own:
            told = trial.user_attrs["metrics"]
            parts["generating"] += told["generate_seconds"]
            parts["scoring"] += told["score_seconds"]
            parts["handing"] += _end(trial) - _start(trial) - told["generate_seconds"] - told["score_seconds"]
            parts["between"] += _start(trial) - free
            free = _end(trial)
        parts["end"] += ended - free
        until_the_end += 3600 * len(own) / (free - began) if own else 0.0
    return {
        "trials_seconds": ended - began, "trials_per_hour": 3600 * len(trials) / (ended - began),
        "trials_per_hour_until_the_end": until_the_end,
        "images_per_second": sum(t.user_attrs["metrics"]["images"] for t in trials) / (ended - began),
        "seconds_per_trial": {part: seconds / len(trials) for part, seconds in parts.items()},
    }  # fmt: skip


def _start(trial: FrozenTrial) -> float:
    assert trial.datetime_start
    return trial.datetime_start.timestamp()


def _end(trial: FrozenTrial) -> float:
    assert trial.datetime_complete
    return trial.datetime_complete.timestamp()


def compare(one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """Efficiency of many workers against one, and what is lost by part, which adds up to the rest."""
    single, several = one["seconds_per_trial"], many["seconds_per_trial"]
    rate, last = "trials_per_hour", "trials_per_hour_until_the_end"
    return {
        "efficiency": many[rate] / one[rate] / many["workers"],
        "efficiency_until_the_end": many[last] / one[last] / many["workers"],
        "lost": {part: (several[part] - single[part]) / sum(several.values()) for part in PARTS},
    }


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(told: dict[str, Any]) -> str:
    """Markdown: rates, where the time went, and what is lost where efficiency misses the goal."""
    rates, times, lines = [], [], []
    for s in told["searches"]:
        name, driver = f"{s['model']}, {s['workers']}{', one killed' * s['killed']}", s["driver"]
        gained = [f"{s[k]:.3f}" if k in s else "" for k in ("efficiency", "efficiency_until_the_end")]
        rates.append([
            name, str(s["trials"]), f"{s['trials_per_hour']:.0f}", *gained, f"{s['images_per_second']:.2f}",
            f"{s['trials_seconds']:.1f}", f"{s['wall_seconds']:.1f}",
        ])  # fmt: skip
        of, memory = s["seconds_per_trial"], (driver["main_gib"], s["worker_main_gib"], s["worker_gpu_gib"])
        times.append([
            name, *(f"{seconds / sum(of.values()):.1%}" for seconds in of.values()),
            f"{driver['search_thread_busy']:.1%}", f"{driver['cpu_ms_per_trial']:.0f}", *(f"{m:.2f}" for m in memory),
        ])  # fmt: skip
        if s.get("efficiency", 1.0) < GOAL:
            lost = ", ".join(f"{PARTS[part]} {100 * share:+.1f}" for part, share in s["lost"].items())
            busy = s["trials"] / s["trials_seconds"] / 10  # from milliseconds per trial to per cent of a core
            share = {key: f"{busy * driver[f'{key}_ms_per_trial']:.1f} %" for key in DRIVER}
            lines.append(
                f"* {name}: {100 * (1 - s['efficiency']):.1f} % of the workers' time is lost against one, in points: "
                f"{lost}. The search's thread is busy for {driver['search_thread_busy']:.1%} of the trials' time, on "
                f"the CPU for {share['search_thread_cpu']}, with records for {share['mlflow_said']}; sending these "
                f"takes {share['mlflow_sent_cpu']} of a core, the whole driver {share['cpu']}.\n"
            )
    broken = [f"* BROKEN, {s['model']} on {s['workers']}: {what}\n" for s in told["searches"]
              for what, held in s["held"].items() if not held]  # fmt: skip
    starts = ", ".join(f"{seconds:.0f} s for {model}" for model, seconds in told["start_seconds"].items())
    return (
        f"{told['device']}; {', '.join(f'{k} {v}' for k, v in told['versions'].items())}; seed {told['seed']}, size "
        f"{told['size']}. Ray, loading and a first run of every worker: {starts}.\n\n"
        + grid(["model, workers", "trials", *RATES], rates)
        + "\nShares of all workers' time, and of the trials' time in which the search's thread does not wait for "
        + "workers; the driver's CPU time per trial; peak memory of the driver, a worker and a GPU.\n\n"
        + grid(["model, workers", *PARTS, "driver busy", "CPU ms", "driver GiB", "worker GiB", "GPU GiB"], times)
        + "\n" * bool(lines or broken) + "".join(lines + broken)
    )  # fmt: skip


def draw(told: dict[str, Any], path: Path) -> None:
    """A panel per model: trials per hour against workers, and the line of one worker's rate times their number."""
    models = list(dict.fromkeys(s["model"] for s in told["searches"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.8), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        searches = [s for s in told["searches"] if s["model"] == model and not s["killed"]]
        workers, rates = [s["workers"] for s in searches], [s["trials_per_hour"] for s in searches]
        last = [s["trials_per_hour_until_the_end"] for s in searches]
        ideal = rates[0] / workers[0]
        axis.plot([0, max(workers)], [0, ideal * max(workers)], color="0.6", ls="--", lw=1.2, label="ideal")
        axis.plot(workers, last, "o", mfc="none", color="C0", label="until the end")
        axis.plot(workers, rates, "o-", color="C0", label="measured")
        for s in searches[1:]:
            if "efficiency" in s:
                place = (s["workers"], s["trials_per_hour"])
                axis.annotate(f"{s['efficiency']:.0%}", place, (6, -12), textcoords="offset points", color="C0")
        axis.set(title=model, xlabel=f"workers, one {told['unit']} each", xlim=(0, 1.12 * max(workers)))
        axis.set_ylim(0, 1.12 * max(ideal * max(workers), *last, *rates))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("trials per hour")
    axes[0][0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
