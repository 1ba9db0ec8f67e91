"""What GenEval's prompts ask for, read from its own file; `template.metadata_of` reads it from a sentence."""

import json
from pathlib import Path
from typing import Any

from .template import COLORS, RELATIONS


def read_metadata(path: str | Path) -> dict[str, dict[str, Any]]:
    """GenEval's `evaluation_metadata.jsonl`, by prompt. ValueError names file, line and field of what is not of it."""
    table = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            metadata = _checked(line, f"{path}:{number}")
            table[metadata["prompt"]] = metadata
    if not table:
        raise ValueError(f"{path} holds no metadata; accepted: one JSON object per line")
    return table


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); accepted: an object with tag, include and prompt") from None
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(k), str) for k in ("tag", "prompt")):
        raise ValueError(f"{where} is {line.strip()[:80]!r}; accepted: an object with tag, include and prompt")
    for key in ("include", "exclude"):
        for i, clause in enumerate(metadata.get(key, [])):
            field = f"{where}: {key}[{i}]"
            if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
                raise ValueError(f"{field} is {clause!r}; accepted: an object with class and count")
            if type(clause.get("count")) is not int or clause["count"] < 1:
                raise ValueError(f"{field}.count is {clause.get('count')!r}; accepted: 1 or more")
            if "color" in clause and clause["color"] not in COLORS:
                raise ValueError(f"{field}.color is {clause['color']!r}; accepted: {', '.join(COLORS)}")
            if "position" in clause and not _places(clause["position"], i):
                raise ValueError(f"{field}.position is {clause['position']!r}; accepted: [relation, an earlier clause]")
    return metadata


def _places(position: Any, clause: int) -> bool:
    match position:
        case [str(relation), int(target)]:
            return relation in RELATIONS and 0 <= target < clause
    return False
