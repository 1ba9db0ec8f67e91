"""Where a run stands: its trials and confirmed candidates as columns, the front, what is left. Needs no torch."""

from typing import Any

from ..evaluators import Interval, families, get, names, scale_of
from ..search.config import Config
from ..search.front import Baseline, Confirmed, Point, hypervolume, slug
from .files import RunFiles, Unreadable
from .trials import Trial, read_trials

_RECENT = 50  # trials whose pace tells how long the rest takes


def standing(files: RunFiles) -> dict[str, Any]:
    """What the page shows first. A directory without a run, or with one that cannot be read, is a sentence."""
    try:
        if not files.has("config.yaml"):
            return {
                "name": files.root.name,
                "state": "empty",
                "sentence": "This folder holds no run. A search started with "
                f"blocktune search --out {files.root} will appear here by itself.",
            }
        return _of_run(files)
    except Unreadable as error:
        return {"name": files.root.name, "state": "broken", "sentence": str(error)}


def _of_run(files: RunFiles) -> dict[str, Any]:
    config = files.config()
    record, confirmed = confirmed_of(files)
    trials, described = study_of(files, config)
    feasible = [t for t in trials if t.complete and t.feasible]  # dropped ones too: their pictures were drawn
    unmodified = next((point(t) for t in trials if t.complete and t.attributes.get("anchor") == "unmodified"), None)
    scales = scales_of(described, config)
    widths = scales[config.objectives.alignment], scales[config.objectives.quality]
    baseline = Baseline(**vars(unmodified), scales=widths) if unmodified else None
    front, history = _history(feasible, baseline, config.prompts.search_images)
    state = _state(trials, config, bool(confirmed), bool(described.get("ended")))
    return {
        "name": config.name,
        "state": state,
        "sentence": _sentence(state, trials, config, confirmed),
        "objectives": config.objectives.model_dump(mode="json"),
        "baseline": baseline and {"latency": baseline.latency},
        "trials": _columns(trials, {p.name for p in front}, baseline),
        "confirmed": [_confirmed(c, margins_of(record)) for c in confirmed],
        "margins": [100 * margin for margin in margins_of(record)],
        "level": record.get("level"),
        "hypervolume": history if baseline else None,
        "search": _search(trials, described, config, state),
        "probe": files.has("probe.parquet"),
    }


def point(trial: Trial) -> Point:
    """A complete trial on the axes."""
    assert trial.values is not None
    return Point(trial.name, *trial.values, trial.attributes["key"], trial.attributes["steps"])


def confirmed_of(files: RunFiles) -> tuple[dict[str, Any], list[Confirmed]]:
    """What confirm wrote; nothing where it has not."""
    if not files.has("confirmed.json"):
        return {}, []
    record = files.json("confirmed.json")
    try:
        return record, [Confirmed.from_dict(c) for c in record["confirmed"]]
    except (KeyError, TypeError) as error:
        raise Unreadable(f"confirmed.json is not what confirm writes: {error!r}.") from None


def study_of(files: RunFiles, config: Config) -> tuple[list[Trial], dict[str, Any]]:
    """The trials in the run directory; none before the first, nor where another storage keeps them."""
    return read_trials(files.path("study.db")) if config.search.storage is None and files.has("study.db") else ([], {})


def scales_of(described: dict[str, Any], config: Config) -> dict[str, float]:
    """What counts as 100 points of each score of the run, by its name.

    An older run did not keep it: then it is asked of the evaluators.
    """
    kept, objectives = (described.get("description") or {}).get("scales", {}), config.objectives
    wanted = objectives.alignment, objectives.quality, *objectives.reported
    return {name: kept[name] if name in kept else _scale(name) for name in wanted}


def _scale(evaluator: str) -> float:
    """1.0 for a user's own, as to open a folder must not run code that it names, and where a checkpoint is not here."""
    if evaluator not in names() and evaluator.partition(":")[0] not in families():
        return 1.0
    try:
        return scale_of(get(evaluator))
    except (ImportError, ValueError):
        return 1.0


def in_points(interval: Interval) -> dict[str, float]:
    """The difference and the ends of its interval as the page tells them."""
    return {k: round(v, 4) for k, v in zip(("delta", "low", "high"), interval.in_points, strict=True)}


def _finished(trials: list[Trial]) -> int:
    return sum(t.complete or (t.state == "FAIL" and "reason" in t.attributes) for t in trials)


def _state(trials: list[Trial], config: Config, confirmed: bool, ended: bool) -> str:
    if not trials:
        return "starting"
    if _finished(trials) < config.search.trials and not ended:
        return "searching"
    return "finished" if confirmed else "confirming"


def _sentence(state: str, trials: list[Trial], config: Config, confirmed: list[Confirmed]) -> str:
    done, wanted = _finished(trials), config.search.trials
    if state == "starting":
        if config.search.storage is not None:
            return "The study is kept in another storage than this folder, which is all that this page reads."
        return "The search has not begun its first trial yet."
    if state == "searching":
        return f"Searching: {done} of {wanted} trials are done."
    if state == "confirming":
        return f"All {done} trials are done; the front is being measured on held-out prompts, or waits for it."
    picked = [f"{' and '.join(c.picks)}: {c.name}" for c in confirmed if c.picks]
    held = "; ".join(picked) if picked else "nothing held beside the unmodified model, so nothing is picked"
    return f"{done} trials, {len(confirmed)} candidates confirmed. {held[0].upper()}{held[1:]}."


def _columns(trials: list[Trial], front: set[str], baseline: Baseline | None) -> dict[str, list[Any]]:
    """A row per trial; alignment and quality are differences to the unmodified model in points."""
    points = [baseline.points(point(t)) if baseline and t.complete else None for t in trials]
    return {
        "number": [t.number for t in trials],
        "name": [t.name for t in trials],
        "slug": [slug(t.name) for t in trials],
        "state": [t.state.lower() for t in trials],
        "alignment": [p and round(p[0], 4) for p in points],
        "quality": [p and round(p[1], 4) for p in points],
        "latency": [round(t.values[2], 6) if t.complete and t.values else None for t in trials],
        "steps": [t.attributes.get("steps") for t in trials],
        "feasible": [t.feasible for t in trials],
        "anchor": ["anchor" in t.attributes for t in trials],
        "dropped": ["dropped" in t.attributes for t in trials],
        "front": [t.complete and t.feasible and t.name in front for t in trials],
        "reason": [t.attributes.get("reason") for t in trials],
    }


def margins_of(record: dict[str, Any]) -> tuple[float, float]:
    """How much alignment and quality may have been lost where a candidate held; older runs have one for both."""
    margin = record.get("margin", 0.0)
    return margin, record.get("quality_margin", margin)


def _confirmed(c: Confirmed, margins: tuple[float, float]) -> dict[str, Any]:
    told = {k: getattr(c, k) for k in ("name", "steps", "anchor", "rules", "speedup", "predicted_speedup", "picks")}
    ends = {k: in_points(getattr(c, k)) for k in ("alignment", "quality")}
    return {"slug": slug(c.name), **told, **ends, "held": c.holds(*margins), "n": c.alignment.n}


def _history(
    feasible: list[Trial], baseline: Baseline | None, images: int
) -> tuple[list[Point], dict[str, list[float]]]:
    """The front, and its hypervolume after so many pictures; a trial that repeats another draws none.

    The front grows point by point, so that two thousand trials take no longer than a person waits.
    """
    front: list[Point] = []
    spent, volume = 0, 0.0
    history: dict[str, list[float]] = {"images": [0], "value": [0.0]}
    for trial in sorted(feasible, key=lambda t: t.end or 0.0):
        if "same_as" in trial.attributes:
            continue
        new = point(trial)
        spent += trial.attributes["metrics"].get("images", images)
        if "dropped" not in trial.attributes and not any(_matches(p, new) for p in front):
            front = [p for p in front if not _matches(new, p)] + [new]
            volume = hypervolume(front, baseline) if baseline else 0.0
        history["images"].append(spent)
        history["value"].append(round(volume, 4))
    return front, history


def _matches(p: Point, q: Point) -> bool:
    """Whether `p` is as good as `q` on every axis."""
    return p.alignment >= q.alignment and p.quality >= q.quality and p.latency <= q.latency


def _workers(trials: list[Trial], recent: list[float]) -> list[dict[str, Any]]:
    """What each worker did and does, and its load: the share of the time of the `recent` ends that it was measuring."""
    told = []
    span = recent[-1] - recent[0] if recent else 0.0
    for number in sorted({t.attributes["worker"] for t in trials if "worker" in t.attributes}):
        own = [t for t in trials if t.attributes.get("worker") == number]
        ends = [(t.start, t.end) for t in own if t.start and t.end and recent and recent[0] < t.end <= recent[-1]]
        busy, known = 0.0, recent[0] if recent else 0.0
        for start, end in sorted(ends):  # one may be drawn while the last is scored
            busy, known = busy + max(0.0, end - max(start, known)), max(known, end)
        now = next((t.number for t in own if t.state == "RUNNING"), None)
        done = sum(t.state in ("COMPLETE", "FAIL") for t in own)
        told.append({"worker": number, "trials": done, "load": round(busy / span, 3) if span else None, "now": now})
    return told


def _search(trials: list[Trial], described: dict[str, Any], config: Config, state: str) -> dict[str, Any]:
    ends = sorted(t.end for t in trials if t.complete and t.end and "same_as" not in t.attributes)
    recent = ends[-_RECENT:]
    left = config.search.trials - _finished(trials)
    pace = (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else None
    states = [t.state for t in trials]
    return {
        "wanted": config.search.trials,
        "complete": states.count("COMPLETE"),
        "failed": states.count("FAIL"),
        "running": states.count("RUNNING"),
        "left": round(left * pace, 1) if pace is not None and state == "searching" else None,
        "last": ends[-1] if ends else None,
        "pace": pace and round(pace, 3),
        "images": config.prompts.search_images,
        "sampler": f"{config.search.sampler}, seed {config.search.seed}",
        "workers": _workers(trials, recent),
        **{k: v for k, v in (described.get("description") or {}).items() if k in ("device", "dtype")},
    }
