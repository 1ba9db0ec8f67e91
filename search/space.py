"""The search space: a dozen choices that together spell a policy, and the anchors, known points of it or near it."""

from collections.abc import Container, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import optuna

from ..policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from ..policies.policy import ModelIdentity
from .candidate import Candidate
from .config import Config, Space

# Doing nothing is a choice of its own: were it left to scales near 1, or one block among many, hardly any proposal
# would leave the text and every block alone.
QUIET = "none"  # operand
NEVER = 1.0  # skip_from


def bands(space: Space, num_blocks: int) -> list[tuple[int, ...]]:
    """Neighbouring blocks in `space.bands` groups of nearly equal size."""
    count = min(space.bands, num_blocks)
    edges = [round(i * num_blocks / count) for i in range(count + 1)]
    return [tuple(range(a, b)) for a, b in pairwise(edges)]


def steps_of(config: Config) -> tuple[int, ...]:
    """The numbers of steps that a candidate may take, the unmodified model's first, which no other exceeds."""
    most = config.generation.num_inference_steps
    return (most, *dict.fromkeys(steps for steps in config.space.steps if steps < most))


def guidance_of(config: Config) -> tuple[float, ...]:
    """The scales of guidance that a candidate may take, from the lowest on, the unmodified model's among them."""
    return tuple(sorted({config.generation.guidance_scale, *config.space.guidance_scale}))


def guidance_ends_of(config: Config) -> tuple[float, ...]:
    """Where a candidate's guidance may end before the run does; nowhere where the model is not guided."""
    return tuple(sorted({*config.space.guidance_until})) if config.generation.guidance_scale > 1 else ()


def text_windows(space: Space) -> dict[str, tuple[float, float]]:
    """Where text may be louder, by the name of the choice: Optuna stores no pairs."""
    return {window_name(window): window for window in space.text_windows}


def window_name(window: tuple[float, float]) -> str:
    """As studies and tables tell it."""
    return f"{window[0]:g}-{window[1]:g}"


def longest_window(space: Space) -> str:
    """The choice that keeps text louder for longest."""
    windows = text_windows(space)
    return max(windows, key=lambda name: windows[name][1] - windows[name][0])


def distributions(config: Config, num_blocks: int) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's view of the space. Actions are categorical (ordinal ones mislead TPE), scales lie on a log axis."""
    categorical, real = optuna.distributions.CategoricalDistribution, optuna.distributions.FloatDistribution
    space = config.space
    choices: dict[str, optuna.distributions.BaseDistribution] = {
        "operand": categorical((QUIET, *space.operands)),
        "text_window": categorical(tuple(text_windows(space))),
        "reuse_from": categorical(space.reuse_from),
    }
    if space.compute_until:
        choices["compute_until"] = categorical((*sorted({*space.compute_until}), 1.0))
    if space.forecast:
        choices["forecast"] = categorical((False, True))
    if len(steps_of(config)) > 1:
        choices["steps"] = categorical(steps_of(config))
    if len(guidance_of(config)) > 1:
        choices["guidance_scale"] = categorical(guidance_of(config))
    if ends := guidance_ends_of(config):
        choices["guidance_until"] = categorical((*ends, 1.0))
    for i in range(len(bands(space, num_blocks))):
        choices[f"scale_{i}"] = real(1.0, space.max_scale, log=True)
        choices[f"reuse_{i}"] = categorical((1, *space.reuse_every))
    if space.skip:
        choices["skip"] = categorical(tuple(range(num_blocks)))
        choices["skip_from"] = categorical((0.25, 0.5, 0.75, NEVER))
    return choices


def suggest(trial: optuna.Trial, space: dict[str, optuna.distributions.BaseDistribution]) -> dict[str, Any]:
    """What the sampler, or whoever enqueued the trial, proposes for every choice of `distributions`."""
    params: dict[str, Any] = {}
    for name, choice in space.items():
        if isinstance(choice, optuna.distributions.CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, choice.choices)
        elif isinstance(choice, optuna.distributions.FloatDistribution):
            params[name] = trial.suggest_float(name, choice.low, choice.high, log=choice.log)
    return params


def candidate(params: dict[str, Any], config: Config, model: ModelIdentity, name: str) -> Candidate:
    """The policy that `params` spell. A scale within 2 % of 1 is no action; a skipped block does nothing else.

    A forecast is followed where guidance has ended, and before that the residual is reused as it is: guidance magnifies
    what the line gets wrong.
    """
    skipped = params["skip"] if params.get("skip_from", NEVER) < NEVER else None
    windows = text_windows(config.space)
    acting: dict[tuple[tuple[float, float], ScaleText | Reuse | Skip], list[int]] = {}  # bands that act alike are one
    until = params.get("guidance_until", 1.0)
    first, last = params["reuse_from"], max(params["reuse_from"], params.get("compute_until", 1.0))
    ahead = until if guidance_ends_of(config) else 0.0
    ahead = max(first, ahead) if params.get("forecast", False) else 1.0
    edges = sorted({first, last, ahead, 1.0})
    for i, blocks in enumerate(bands(config.space, model.num_blocks)):
        own = [block for block in blocks if block != skipped]
        if not own:
            continue
        scale = round(params[f"scale_{i}"], 3)
        if params["operand"] != QUIET and scale > 1.02:
            action = ScaleText(operand=params["operand"], scale=scale)
            acting.setdefault((windows[params["text_window"]], action), []).extend(own)
        if params[f"reuse_{i}"] > 1:
            for window in pairwise(edges):
                every = params[f"reuse_{i}"] if window[0] < last else None
                action = Reuse(every=every, forecast="linear" if window[0] >= ahead else None)
                acting.setdefault((window, action), []).extend(own)
    if skipped is not None:
        acting[(params["skip_from"], 1.0), Skip()] = [skipped]
    rules = tuple(Rule(blocks=tuple(of), window=window, action=action) for (window, action), of in acting.items())
    policy = BlockPolicy(name=name, model=model, rules=rules, guidance_window=(0.0, until))
    plain = config.generation
    steps = params.get("steps", plain.num_inference_steps)
    guidance = params.get("guidance_scale", plain.guidance_scale)
    return Candidate(policy, steps, guidance if guidance != plain.guidance_scale else None)


def notches(params: dict[str, Any], config: Config, num_blocks: int) -> dict[str, dict[str, Any]]:
    """`params` with one choice changed by one notch: the next of a list's values, a tenth of a scale's axis. By change.

    Another operand is no notch.
    """
    changed = {}
    for name, choice in distributions(config, num_blocks).items():
        values: list[Any] = []
        if isinstance(choice, optuna.distributions.FloatDistribution):
            notch = (choice.high / choice.low) ** 0.1
            values = [max(params[name] / notch, choice.low), min(params[name] * notch, choice.high)]
        elif isinstance(choice, optuna.distributions.CategoricalDistribution) and name != "operand":
            at = choice.choices.index(params[name])
            values = [choice.choices[i] for i in (at - 1, at + 1) if 0 <= i < len(choice.choices)]
        changed |= {f"{name} {value}": params | {name: value} for value in values}
    return changed


def neighbours(params: dict[str, Any], config: Config, model: ModelIdentity) -> list[Candidate]:
    """What is a notch away from `params` and does something else, called by the change."""
    own, found = candidate(params, config, model, "itself"), dict[str, Candidate]()
    for name, changed in notches(params, config, model.num_blocks).items():
        one = candidate(changed, config, model, name)
        if one.behaviour != own.behaviour:
            found.setdefault(one.behaviour, one)
    return list(found.values())


class _Around(NamedTuple):
    """Params, by what they do, and what is a notch away: the params, and what they do where that was asked."""

    own: str
    changed: list[dict[str, Any]]
    does: list[str | None]


class Around:
    """The params of what is a notch away from others. Forty policies take 80 ms: each is worked out when it is met."""

    def __init__(self, config: Config, model: ModelIdentity) -> None:
        self.config, self.model = config, model
        self._found: dict[frozenset[tuple[str, Any]], _Around] = {}

    def near(
        self, members: Sequence[dict[str, Any]], known: Container[str], rng: np.random.Generator
    ) -> dict[str, Any] | None:
        """The params of a random neighbour of any of `members` whose behaviour is not `known`; None where all are."""
        for member in rng.permutation(len(members)):
            around = self._around(members[member])
            for i in rng.permutation(len(around.changed)):
                does = around.does[i] = around.does[i] or self._behaviour(around.changed[i])
                if does != around.own and does not in known:
                    return around.changed[i]
        return None

    def _around(self, params: dict[str, Any]) -> _Around:
        key = frozenset(params.items())
        if key not in self._found:
            changed = list(notches(params, self.config, self.model.num_blocks).values())
            self._found[key] = _Around(self._behaviour(params), changed, [None] * len(changed))
        return self._found[key]

    def _behaviour(self, params: dict[str, Any]) -> str:
        return candidate(params, self.config, self.model, "one").behaviour


def anchors(config: Config, num_blocks: int) -> dict[str, dict[str, Any]]:
    """Known points, measured first: what `candidate` takes, by the name they are reported under.

    Those of `space.anchor_steps` take a number of steps that the space may not offer; only fewer ones are of use.
    """
    space, own = config.space, config.generation
    count = len(bands(space, num_blocks))
    windows = tuple(text_windows(space))
    # of choices that do nothing here the middle ones: a sampler takes what good points have for good
    plain: dict[str, Any] = {"operand": QUIET, "text_window": windows[len(windows) // 2]}
    plain |= {"reuse_from": space.reuse_from[len(space.reuse_from) // 2], "compute_until": 1.0, "forecast": False}
    plain |= {f"scale_{i}": 1.0 for i in range(count)} | {f"reuse_{i}": 1 for i in range(count)}
    if space.skip:
        plain |= {"skip": 0, "skip_from": NEVER}
    plain |= {"steps": own.num_inference_steps, "guidance_scale": own.guidance_scale, "guidance_until": 1.0}
    points = {"unmodified": plain}
    points |= {f"{steps} steps": plain | {"steps": steps} for steps in space.anchor_steps if steps < plain["steps"]}
    others = [scale for scale in guidance_of(config) if scale != own.guidance_scale]
    points |= {f"guidance {scale:g}": plain | {"guidance_scale": scale} for scale in others}
    if ends := guidance_ends_of(config):
        end = ends[len(ends) // 2]
        points[f"guidance until {end:g}"] = plain | {"guidance_until": end}
    for every in space.reuse_every[-2:]:
        points[f"late reuse {every}"] = plain | {f"reuse_{i}": every for i in range(count)}
    louder = "value" if "value" in space.operands else space.operands[0]
    points["all text up"] = (
        plain
        | {"operand": louder, "text_window": longest_window(space)}
        | {f"scale_{i}": min(1.25, space.max_scale) for i in range(count)}
    )
    return points
