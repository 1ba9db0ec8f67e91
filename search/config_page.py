"""`docs/config.md`, made from the schema of the config: python -m blocktune.search.config_page > docs/config.md"""

import json
from typing import Any

from .config import Config

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def page() -> str:
    """`docs/config.md`: every field with what it accepts, its default and its meaning."""
    schema = Config.model_json_schema()
    lines = [
        "# The config of a search",
        "",
        "A YAML file of sections; every field has a default, and `--set section.field=value` goes before the file.",
        "This page is made from the schema: `python -m blocktune.search.config_page > docs/config.md`.",
    ]
    lines += [
        "",
        f"`name` (default `{schema['properties']['name']['default']}`) {schema['properties']['name']['description']}.",
    ]
    for section, field in Config.model_fields.items():
        if section == "name":
            continue
        lines += ["", f"## {section}", "", "| field | accepts | default | |", "|---|---|---|---|"]
        properties = schema["$defs"][type(field.default).__name__]["properties"]
        for name, told in properties.items():
            default = json.dumps(told.get("default"))
            lines.append(f"| `{name}` | {_accepted(told)} | `{default}` | {told.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _accepted(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(_accepted(one) for one in told["anyOf"])
    if "$ref" in told:
        return "mapping"
    if "enum" in told:
        return ", ".join(f"`{value}`" for value in told["enum"])
    if told["type"] == "array":
        items = told.get("items") or {"type": "value"}
        return f"list of{' at least one' if told.get('minItems') == 1 else ''}: {_accepted(items)}"
    kind: str = told["type"]
    word = {"integer": "whole number", "null": "nothing", "object": "mapping"}.get(kind, kind)
    bounds = [f"{said} {told[bound]:.10g}" for bound, said in _BOUNDS.items() if bound in told]
    return " ".join([word, " and ".join(bounds)]).strip()


if __name__ == "__main__":
    print(page(), end="")
