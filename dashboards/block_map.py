"""What a policy does as a map of blocks and steps, laid out by the plan that pipelines obey.

The policies room needs torch, which takes seconds to import: it is imported here at the first map that is asked for.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..search.config import Config
from ..search.front import slug
from .candidate import find, policy_files
from .files import Missing, RunFiles, Unreadable
from .trials import Trial, read_policy

_LETTERS = {"compute": "c", "skip": "s", "reuse": "r"}


def _policy(files: RunFiles, trial: Trial):
    from ..policies import BlockPolicy, PolicyError

    stored = read_policy(files.path("study.db"), trial.number)
    if stored is None:
        raise Missing(f"{trial.name} stored no policy.")
    try:
        return BlockPolicy.model_validate(stored)
    except PolicyError as error:
        raise Unreadable(f"the policy of {trial.name} cannot be read: {error}") from None


def block_map(files: RunFiles, name: str) -> dict[str, Any]:
    """A map per branch that the rules tell apart: blocks x steps of letters, and which louder text each cell hears."""
    trial = find(files, name)[0]
    policy, steps = _policy(files, trial), trial.attributes["steps"]
    guided = any(rule.branch != "both" for rule in policy.rules) or policy.guides_in_part
    return {
        "steps": steps,
        "blocks": policy.model.num_blocks,
        "bands": _bands(policy.model.transformer, policy.model.num_blocks, files.config()),
        "rules": _sentences(policy),
        "branches": [_layout(policy, steps, branch) for branch in (("cond", "uncond") if guided else ("both",))],
    }


def policy_file(files: RunFiles, name: str) -> bytes:
    """The bytes of `policies/<name>.json`; of a trial that was not confirmed, what the search stored of it."""
    if files.has("policies", f"{name}.json"):
        return files.path("policies", f"{name}.json").read_bytes()
    trial, confirmed, _ = find(files, name)
    if confirmed and (there := policy_files(files, trial, confirmed)) != [name]:
        return policy_file(files, there[0])
    return _policy(files, trial).model_copy(update={"name": slug(trial.name)}).to_json_string().encode()


def _layout(policy, steps: int, branch) -> dict[str, Any]:
    from ..policies import Plan

    plan = Plan.compile(policy, steps, branch=branch)
    heard: dict[str, float] = {}
    cells = [[0] * steps for _ in range(policy.model.num_blocks)]
    for i, step in enumerate(plan.steps):
        for block, does in enumerate(step):
            if does.scales:
                label = ", ".join(_scale(action) for _, action in does.scales)
                heard[label] = max((action.scale for _, action in does.scales), key=_loudness)
                cells[block][i] = list(heard).index(label) + 1
    counts = plan.counts()
    return {
        "branch": branch,
        "kinds": ["".join(_LETTERS[step[block].kind] for step in plan.steps) for block in range(len(cells))],
        "scales": cells,
        "heard": [{"label": label, "scale": scale} for label, scale in heard.items()],
        "counts": {k: getattr(counts, k) for k in ("computed", "skipped", "reused", "scaled")},
    }


def _loudness(scale: float) -> float:
    """How far a scale is from leaving the text alone."""
    return abs(math.log(scale)) if scale > 0 else math.inf


def _scale(action) -> str:
    tokens = {"all": "", "prompt": " of the prompt"}.get(action.tokens) if isinstance(action.tokens, str) else None
    return f"text {action.operand}{' of ' + ', '.join(action.tokens) if tokens is None else tokens} × {action.scale:g}"


def _sentences(policy) -> list[str]:
    """What the policy says, in words; rules that differ in their blocks alone are one sentence."""
    blocks: dict[Any, set[int]] = {}
    for rule in policy.rules:
        blocks.setdefault((rule.window, rule.branch, rule.action), set()).update(rule.blocks)
    said = [_sentence(sorted(those), *does) for does, those in blocks.items()]
    if policy.guides_in_part:
        start, end = (f"{100 * x:g}" for x in policy.guidance_window)
        said.append(
            f"Guidance acts in {start}–{end} % of the run; at other steps its unconditional half is not computed"
        )
    return said


def _sentence(blocks: list[int], window: tuple[float, float], branch: str, action) -> str:
    """Blocks, part of the run, action."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block - 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    spelled = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in ranges)
    start, end = (f"{100 * x:g}" for x in window)
    does = {
        "skip": lambda: "skip",
        "reuse": lambda: (
            (f"compute every {action.every} steps, reuse between" if action.every else "reuse throughout")
            + ", as the last two residuals go on" * (action.forecast == "linear")
        ),
        "scale_text": lambda: _scale(action),
    }[action.type]()
    rows = "" if branch == "both" else f", {branch}itional rows only"
    return f"Block{'s' * (len(blocks) > 1)} {spelled}, {start}–{end} % of the run{rows}: {does}"


def _bands(transformer: str, num_blocks: int, config: Config) -> list[dict[str, Any]]:
    """The block lists of the transformer, each with its first block and size.

    How many blocks each list has is told by the model's own config, where that lies on this machine; else one band.
    """
    from ..policies.architectures import ARCHITECTURES

    whole = [{"name": "", "first": 0, "count": num_blocks}]
    row = ARCHITECTURES.get(transformer)
    if row is None or len(row.blocks) < 2:
        return whole
    model = _model_config(config.model.path)
    counts = [sum(v for k, v in model.items() if k in fields and isinstance(v, int)) for fields in _COUNTED]
    if not all(counts) or sum(counts) != num_blocks:
        return whole
    return [
        {"name": "double-stream", "first": 0, "count": counts[0]},
        {"name": "single-stream", "first": counts[0], "count": counts[1]},
    ]


_COUNTED = ({"num_layers", "num_mmdit_layers"}, {"num_single_layers", "num_single_dit_layers"})


def _model_config(path: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    local = Path(path) / "transformer" / "config.json"
    try:
        if not local.exists() and path.count("/") == 1:
            local = Path(try_to_load_from_cache(path, "transformer/config.json") or local)
        return json.loads(local.read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return {}
