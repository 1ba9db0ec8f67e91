"""The one exception of this room, and how pydantic's reports become one."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


class PolicyError(ValueError):
    """A policy, its file, or the model or pipeline that it meets is not acceptable; one sentence says why."""


def short(value: Any) -> str:
    """repr, cut to fit a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refusal(error: ValidationError, model: type[BaseModel], parts: Mapping[Any, type[BaseModel]]) -> PolicyError:
    """One sentence on the first fault that pydantic found: field, value, what is accepted.

    `model` is what was validated; `parts` names the models inside it, by field or by tag of a union.
    """
    first = error.errors(include_url=False)[0]
    path, owner = "", model
    for i, part in enumerate(first["loc"]):
        if i + 1 < len(first["loc"]):
            owner = parts.get(part, owner)
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (i and first["loc"][i - 1] == "action" and part in parts):  # there the part is a tag, not a field
            path += f".{part}" if path else part
    kind, value = first["type"], short(first["input"])
    if kind == "value_error":
        # A sentence of a validator of ours; it opens with the name of the field, or stands for the object as a whole.
        reason = str(first["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
        field = path.rpartition(".")[2]
        return PolicyError(path.removesuffix(field) + reason if reason.startswith(field) else f"{path}.{reason}")
    if kind == "extra_forbidden":
        return PolicyError(f"{path} is not a known field; known are {', '.join(owner.model_fields)}.")
    if kind == "missing":
        return PolicyError(f"{path} is missing; {owner.__name__} needs it.")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return PolicyError(f"{path} is {value}; its type must be one of 'skip', 'reuse', 'scale_text'.")
    accepted = re.sub(r"^(Input|Tuple|String|List) should", "it should", first["msg"])
    return PolicyError(f"{path or model.__name__} is {value}; {accepted.partition(' after validation')[0]}.")
