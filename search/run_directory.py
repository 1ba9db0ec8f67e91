"""The folder of a run: what lies where, and how it is written so that a kill at any moment leaves it whole."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ..evaluators import Prompt
from .config import Config, ConfigError, parsed


class RunDirectory:
    """Paths of a run. Files are written beside and renamed into place."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.state = path / "config.yaml", path / "run.json"
        self.scores, self.policies, self.images = path / "scores", path / "policies", path / "images"
        self.front, self.compare, self.report = path / "front.png", path / "compare.png", path / "report.md"
        self.page = path / "report.html"
        self.confirmed = path / "confirmed.json"
        self._lock: int | None = None

    @classmethod
    def open(cls, path: Path, config: Config, resume: bool) -> "RunDirectory":
        """Create the folder, or find the one to resume, and hold it until `release` or the end of this process.

        ConfigError for a folder that holds another run, or none to resume, that another process holds, or that cannot
        be written.
        """
        run = cls(path)
        if resume and not run.config.exists():
            raise ConfigError(f"{path} holds no run to resume; start one without --resume.")
        if not resume and run.config.exists():
            raise ConfigError(f"{path} already holds a run; go on with --resume, or start another with --out or name.")
        try:
            for folder in (run.scores, run.policies, run.images):
                folder.mkdir(parents=True, exist_ok=True)
            if resume:
                run.check_same(config)
            run._hold()
            run.write_text(run.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
        return run

    def check_same(self, config: Config) -> None:
        """ConfigError where `config` measures something else than the run that is here, whose scores would mix."""
        before = self.load_config().searched()
        for section, value in config.searched().items():
            if before[section] != value:
                raise ConfigError(
                    f"{section} differs from the run in {self.path}; resume with the same, or start another run."
                )

    def _hold(self) -> None:
        """Two searches in one folder would take each other's trials for those of a dead one. A kill frees the lock."""
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"{self.path} is in use by another search; wait for it, or choose another --out."
            ) from None

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        if not (path / "config.yaml").exists():
            raise ConfigError(f"{path} holds no run; accepted: the folder that a search wrote, as runs/reference.")
        return cls(path)

    @classmethod
    def of_search(cls, path: Path) -> "RunDirectory":
        """An existing one that a search wrote; ConfigError for that of a probe, whose state names no search."""
        run = cls.existing(path)
        state = run.read_state()
        if state and not {"search", "mlflow_run_id"} & state.keys():
            raise ConfigError(f"{path} holds a probe; accepted: the folder that a search wrote, as runs/reference.")
        return run

    def load_config(self) -> Config:
        """ConfigError for one with fields that this version does not know."""
        try:
            return parsed(Config, yaml.safe_load(self.config.read_text("utf-8")))
        except ConfigError as error:
            raise ConfigError(f"the run in {self.path} is of another version of blocktune: {error}") from None

    def finished(self, config: Config) -> bool:
        """Whether this very search, with the same budget, has come to its end here."""
        return self.read_state().get("finished") == config.model_dump(mode="json")

    def write_text(self, path: Path, text: str) -> None:
        beside = path.with_name(path.name + ".new")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def write_json(self, path: Path, value: Any) -> None:
        self.write_text(path, json.dumps(value, indent=2) + "\n")

    def read_state(self) -> dict[str, Any]:
        return json.loads(self.state.read_text()) if self.state.exists() else {}

    def write_scores(
        self,
        name: str,
        prompts: tuple[Prompt, ...],
        scores: dict[str, np.ndarray],
        distances: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Per-image scores as `scores/<name>.parquet`: a row per picture with prompt, kind, seed and scores.

        `distances`, which are of all of them together, are attributes of the table.
        """
        table = pd.DataFrame(
            {
                "prompt": [p.text for p in prompts],
                "kind": [p.kind for p in prompts],
                "seed": [p.seed for p in prompts],
                **scores,
            }
        )
        table.attrs = {**distances}
        beside = self.scores / f"{name}.new"
        table.to_parquet(beside, index=False)
        beside.replace(self.scores / f"{name}.parquet")

    def read_scores(self, name: str) -> Any:  # a DataFrame, whose annotations answer for every kind of index at once
        return pd.read_parquet(self.scores / f"{name}.parquet")

    def write_images(self, name: str, images: np.ndarray) -> None:
        beside = self.images / f"{name}.new.npz"
        np.savez_compressed(beside, images=images)
        beside.replace(self.images / f"{name}.npz")

    def read_images(self, name: str) -> np.ndarray:
        with np.load(self.images / f"{name}.npz") as stored:
            return stored["images"]
