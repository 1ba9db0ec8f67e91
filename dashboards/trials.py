"""The trials of a study as columns, read from its SQLite file without Optuna: two thousand in a blink, never a lock."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..search.front import name_of
from .files import Unreadable

_ATTRIBUTES = (
    "anchor", "origin", "key", "steps", "guidance_scale", "reason", "same_as", "metrics", "retry_of", "worker",
    "dropped",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A row of the study. Times are seconds since 1970; values are None until the trial is complete."""

    number: int
    state: str  # COMPLETE, FAIL, RUNNING, WAITING
    start: float | None
    end: float | None
    values: tuple[float, float, float] | None  # alignment, quality, latency in seconds per batch
    feasible: bool
    rules: int
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        return name_of(self.number, self.attributes)

    @property
    def complete(self) -> bool:
        return self.state == "COMPLETE" and self.values is not None and "key" in self.attributes


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)


def read_trials(path: Path) -> tuple[list[Trial], dict[str, Any]]:
    """All trials in order, and what the study says of itself. Raises Unreadable for what is no study of a search."""
    try:
        with closing(_connect(path)) as database:
            study = database.execute("SELECT study_id FROM studies WHERE study_name = 'blocktune'").fetchone()
            if study is None:
                raise Unreadable(f"{path.name} holds no study of blocktune.")
            rows = database.execute(
                "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials"
                " WHERE study_id = ? ORDER BY number", study,
            ).fetchall()  # fmt: skip
            values: dict[int, dict[int, float | None]] = {}
            for trial, objective, value in database.execute("SELECT trial_id, objective, value FROM trial_values"):
                values.setdefault(trial, {})[objective] = value
            attributes: dict[int, dict[str, Any]] = {}
            marks = ", ".join("?" * len(_ATTRIBUTES))
            asked = f"SELECT trial_id, key, value_json FROM trial_user_attributes WHERE key IN ({marks})"
            for trial, key, value in database.execute(asked, _ATTRIBUTES):
                attributes.setdefault(trial, {})[key] = json.loads(value)
            whole = "'[0.0,1.0]'"  # as SQLite writes it
            asked = (
                "SELECT trial_id, json_array_length(value_json, '$.rules')"
                f" + (coalesce(json_extract(value_json, '$.guidance_window'), {whole}) <> {whole})"
                " FROM trial_user_attributes WHERE key = 'policy'"
            )
            rules = dict(database.execute(asked))
            asked = "SELECT trial_id, value_json FROM trial_system_attributes WHERE key LIKE 'constraints:%'"
            broken = {trial for trial, value in database.execute(asked) if json.loads(value) > 0}
            asked = "SELECT key, value_json FROM study_user_attributes WHERE study_id = ?"
            described = {key: json.loads(value) for key, value in database.execute(asked, study)}
    except (sqlite3.Error, ValueError, TypeError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path.name} cannot be read: {error}.") from None
    return [
        Trial(
            number, state, _seconds(start), _seconds(end), _three(values.get(i, {})), i not in broken,
            rules.get(i) or 0, attributes.get(i, {}),
        )
        for i, number, state, start, end in rows
    ], described  # fmt: skip


def read_policy(path: Path, number: int) -> dict[str, Any] | None:
    """The policy of one trial as the search stored it; None where there is none."""
    try:
        with closing(_connect(path)) as database:
            row = database.execute(
                "SELECT a.value_json FROM trial_user_attributes a JOIN trials t USING (trial_id) JOIN studies s"
                " USING (study_id) WHERE s.study_name = 'blocktune' AND t.number = ? AND a.key = 'policy'", (number,),
            ).fetchone()  # fmt: skip
            return json.loads(row[0]) if row else None
    except (sqlite3.Error, ValueError) as error:
        raise Unreadable(f"{path.name} cannot be read: {error}.") from None


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def _three(values: dict[int, float | None]) -> tuple[float, float, float] | None:
    """None too where a value is infinite: SQLite keeps no number then."""
    alignment, quality, latency = (values.get(i) for i in range(3))
    return None if alignment is None or quality is None or latency is None else (alignment, quality, latency)
