"""What the page asks for, by address: the server gives these answers one at a time, the report carries them along."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .block_map import block_map
from .candidate import describe
from .files import Missing, RunFiles
from .probe import read_probe
from .standing import standing

_ANSWERS: dict[str, Callable[..., Any]] = {
    r"api/run": standing,
    r"api/probe": read_probe,
    r"api/candidates/([^/]+)": describe,
    r"api/plans/([^/]+)": block_map,
}


def answer(files: RunFiles, address: str) -> Any:
    """The plain JSON value at `address`. Raises Missing or Unreadable."""
    return _answer(files, address, files.stamp())


@lru_cache(maxsize=256)
def _answer(files: RunFiles, address: str, _stamp: str) -> Any:
    for pattern, give in _ANSWERS.items():
        if found := re.fullmatch(pattern, address):
            return give(files, *found.groups())
    raise Missing(f"{address} is not an address of this page.")
