"""One candidate: what was measured of it against the unmodified model, picture by picture. Needs no torch."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from ..evaluators import Interval, paired_interval
from ..search.config import Config
from ..search.front import Confirmed, held_out_name, is_fidelity, slug
from . import pictures
from .files import Missing, RunFiles, Unreadable
from .standing import confirmed_of, in_points, margins_of, scales_of, study_of
from .trials import Trial


def find(files: RunFiles, name: str) -> tuple[Trial, Confirmed | None, tuple[float, float]]:
    """The complete trial under its name or `trial-7`, as confirmed, and the margins of the run."""
    # an older run confirmed known points by the numbers of their trials
    complete = [t for t in study_of(files, files.config())[0] if t.complete]
    found = [t for t in complete if name in (slug(t.name), f"trial-{t.number}")]
    if not found:
        raise Missing(f"{name} is no finished trial of this run.")
    record, confirmed = confirmed_of(files)
    held_out = next((c for c in confirmed if c.key == found[0].attributes["key"]), None)
    return found[0], held_out, margins_of(record)


def policy_files(files: RunFiles, trial: Trial, confirmed: Confirmed | None) -> list[str]:
    """Names of the policy files on disk, the pick's first."""
    names = [*confirmed.picks, slug(confirmed.name)] if confirmed else []
    return [name for name in names if files.has("policies", f"{name}.json")] or [slug(trial.name)]


def describe(files: RunFiles, name: str) -> dict[str, Any]:
    """Everything of one candidate but its plan, which takes torch. Raises Missing or Unreadable."""
    config = files.config()
    trial, confirmed, margins = find(files, name)
    objectives = config.objectives
    scales = scales_of(study_of(files, config)[1], config)
    if confirmed:
        before, after = "confirm-unmodified", held_out_name(confirmed)
        intervals = confirmed.intervals(objectives)
    else:
        before, after = "unmodified", f"trial-{trial.attributes.get('same_as', trial.number):04d}"
        intervals = {}
    tables = _scores(files, before), _scores(files, after)
    if "dropped" in trial.attributes:  # from the race, with the first pictures alone
        tables = {column: values[: len(tables[1]["seed"])] for column, values in tables[0].items()}, tables[1]
    if tables[0].keys() != tables[1].keys() or len(tables[0]["seed"]) != len(tables[1]["seed"]):
        raise Unreadable(f"scores/{after}.parquet does not fit scores/{before}.parquet.")
    everything = np.ones(len(tables[0]["seed"]), bool)
    metrics = []
    for evaluator, scale in scales.items():
        interval = intervals.get(evaluator) or _interval(tables, evaluator, everything, scale)
        metrics.append({"name": evaluator, "fidelity": is_fidelity(evaluator), **_told(interval)})
    speedup = trial.attributes["metrics"].get("speedup")
    names = policy_files(files, trial, confirmed) if trial.rules else []
    return {
        "slug": name,
        "name": trial.name,
        "anchor": "anchor" in trial.attributes,
        "steps": trial.attributes["steps"],
        "guidance": trial.attributes.get("guidance_scale"),  # where it is not the model's own
        "speedup": confirmed.speedup if confirmed else speedup,
        "predicted": speedup,
        "seconds": confirmed.seconds if confirmed else trial.attributes["metrics"].get("latency"),
        "confirmed": confirmed is not None,
        "held": bool(confirmed and confirmed.holds(*margins)),
        "picks": confirmed.picks if confirmed else [],
        "best_of": confirmed.best_of if confirmed else [],
        "metrics": metrics,
        "kinds": _kinds(tables, {k: scales[k] for k in (objectives.alignment, objectives.quality)}),
        "pairs": _pairs(tables, objectives.alignment, objectives.quality),
        "pictures": {"before": before, "after": after, "count": min(pictures.count(files, n) for n in (before, after))},
        "files": names,
        "code": _code(files, names[0], trial, config) if names else None,
    }


def _scores(files: RunFiles, name: str) -> dict[str, np.ndarray]:
    try:
        table = parquet.read_table(files.path("scores", f"{name}.parquet"))
        return {column: table[column].to_numpy() for column in table.column_names}
    except (OSError, pyarrow.ArrowException) as error:
        raise Unreadable(f"scores/{name}.parquet cannot be read: {' '.join(str(error).split())[:200]}.") from None


def _interval(tables: tuple[dict, dict], evaluator: str, rows: np.ndarray, scale: float) -> Interval | None:
    """None where one prompt alone cannot show a spread."""
    before, after = tables
    prompts = before["prompt"][rows]
    if len(set(prompts)) < 2:
        return None
    return paired_interval(after[evaluator][rows], before[evaluator][rows], groups=list(prompts), scale=scale)


def _told(interval: Interval | None) -> dict[str, Any]:
    """Scores as they are, what they differ in points."""
    return {k: round(v, 6) for k, v in asdict(interval).items()} | in_points(interval) if interval else {}


def _kinds(tables: tuple[dict, dict], scales: dict[str, float]) -> list[dict[str, Any]]:
    """Per kind of prompt the difference in both objectives; without an interval where a kind has one prompt."""
    before, after = tables
    told = []
    for kind in dict.fromkeys(before["kind"]):
        rows = before["kind"] == kind
        row: dict[str, Any] = {"kind": kind, "n": int(rows.sum())}
        for role, (evaluator, scale) in zip(("alignment", "quality"), scales.items(), strict=True):
            delta = 100 * float((after[evaluator][rows] - before[evaluator][rows]).mean()) / scale
            row[role] = {"delta": round(delta, 4)} | _told(_interval(tables, evaluator, rows, scale))
        told.append(row)
    return told


def _pairs(tables: tuple[dict, dict], alignment: str, quality: str) -> dict[str, list[Any]]:
    """Columns, a row per picture in the order of the archive."""
    before, after = tables
    columns = {name: before[name].tolist() for name in ("prompt", "kind", "seed")}
    for role, evaluator in (("alignment", alignment), ("quality", quality)):
        for when, table in (("before", before), ("after", after)):
            columns[f"{role}_{when}"] = table[evaluator].round(4).tolist()
    return columns


def _code(files: RunFiles, file: str, trial: Trial, config: Config) -> str:
    """The five lines that apply the policy, with the sampling it was tuned for."""
    tuned: dict[str, Any] = {"num_inference_steps": trial.attributes["steps"]}
    tuned["guidance_scale"] = trial.attributes.get("guidance_scale", config.generation.guidance_scale)
    if files.has("policies", f"{file}.json"):
        try:
            stored = json.loads(files.path("policies", f"{file}.json").read_text("utf-8")).get("tuned_for") or {}
        except (OSError, ValueError) as error:
            raise Unreadable(f"policies/{file}.json cannot be read: {error}.") from None
        tuned |= {k: stored[k] for k in ("height", "width", "max_sequence_length") if stored.get(k) is not None}
    sampling = ", ".join(f"{key}={value!r}" for key, value in tuned.items())
    return (
        "from blocktune.policies import BlockPolicy, apply_policy\n"
        f'policy = BlockPolicy.load("{file}.json")\n'
        "with apply_policy(pipe, policy) as applied:\n"
        f"    image = pipe(prompt, {sampling}).images[0]\n"
        "print(applied.report)\n"
    )
