"""The files of a run directory as the page may read them: inside of it, never written, known by their times."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..search.config import Config

_WATCHED = (
    "config.yaml", "run.json", "study.db", "study.db-wal", "confirmed.json", "probe.parquet", "policies", "scores"
)  # fmt: skip


class Missing(LookupError):
    """What was asked for is not there; one sentence says what."""


class Unreadable(ValueError):
    """A file of the run is not what a search writes; one sentence says which and why."""


class RunFiles:
    """Reads in one run directory. A name that leads outside of it, by whatever spelling or link, is Missing."""

    def __init__(self, root: Path):
        self.root = root.resolve()

    def path(self, *parts: str) -> Path:
        """The existing file or folder of that name."""
        for part in parts:
            if part in ("", ".", "..") or any(c in part for c in "/\\\0"):
                raise Missing(f"{part!r} is no name of a file in a run.")
        path = self.root.joinpath(*parts)
        try:
            found = path.resolve(strict=True).is_relative_to(self.root)
        except OSError:
            found = False
        if not found:
            raise Missing(f"{'/'.join(parts)} is not in this run.")
        return path

    def has(self, *parts: str) -> bool:
        try:
            return bool(self.path(*parts))
        except Missing:
            return False

    def stamp(self) -> str:
        """Changes whenever a file that the page draws from does."""
        times = []
        for name in _WATCHED:
            if self.has(name):
                stat = (self.root / name).stat()
                times.append(f"{stat.st_mtime_ns:x}.{stat.st_size:x}")
            else:
                times.append("-")
        return ".".join(times)

    def json(self, name: str) -> Any:
        """Raises Unreadable for what is not JSON."""
        try:
            return json.loads(self.path(name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Unreadable(f"{name} cannot be read: {error}.") from None

    def config(self) -> Config:
        """Raises Unreadable, in one sentence, for what is no config of a search."""
        try:
            return _config(self.path("config.yaml").read_text("utf-8"))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "it"
            told = first["msg"][0].lower() + first["msg"][1:]  # the rest may quote a pattern
            raise Unreadable(f"config.yaml is of no search: {field}: {told}.") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise Unreadable(f"config.yaml cannot be read: {' '.join(str(error).split())[:200]}.") from None


@lru_cache(maxsize=1)
def _config(text: str) -> Config:
    """Every answer asks for it, and reading YAML takes 50 ms."""
    return Config.model_validate(yaml.safe_load(text))
