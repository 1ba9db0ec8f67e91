"""Evaluators by name. Built-in ones are lazy targets: nothing is imported before its name is asked for."""

from collections.abc import Callable
from importlib import import_module

from .evaluator import Evaluator

Target = str | Callable[[], Evaluator]

_targets: dict[str, Target] = {
    "sane": "blocktune.evaluators.sanity:Sane",
    "psnr": "blocktune.evaluators.fidelity:Psnr",
    "ssim": "blocktune.evaluators.fidelity:Ssim",
    "shapes": "blocktune.reference.judge:Shapes",
    "shapes_binary": "blocktune.reference.judge:ShapesBinary",
    "crispness": "blocktune.reference.crispness:Crispness",
    "compositional": "blocktune.evaluators.compositional_judge:Compositional",
    "geneval": "blocktune.evaluators.geneval:GenEval",
    "geneval_binary": "blocktune.evaluators.geneval:GenEvalBinary",
    "t2i_attribute": "blocktune.evaluators.t2i_evaluators:Attribute",
    "t2i_spatial": "blocktune.evaluators.t2i_evaluators:Spatial",
    "t2i_3d_spatial": "blocktune.evaluators.t2i_evaluators:Spatial3d",
    "t2i_numeracy": "blocktune.evaluators.t2i_evaluators:Numeracy",
    "t2i_non_spatial": "blocktune.evaluators.t2i_evaluators:NonSpatial",
    "t2i_complex": "blocktune.evaluators.t2i_evaluators:Complex",
}
_made: dict[str, Evaluator] = {}


class UnknownEvaluator(ValueError):
    """No evaluator has that name."""


def names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_targets))


def register(name: str, target: Target) -> None:
    """Make an evaluator known as `name`: a class or function that makes it, or where to find one, `"module:object"`.

    Registering the same target again is harmless; ValueError when the name stands for another.
    """
    if isinstance(target, str) and not all(target.partition(":")):
        raise ValueError(f"target is {target!r}; accepted: 'module:object', or a callable that makes the evaluator")
    if _targets.setdefault(name, target) != target:
        raise ValueError(f"name {name!r} already stands for {_targets[name]}; accepted: a name that is not taken")


def get(name: str) -> Evaluator:
    """The evaluator of that name, made on first use and kept: weights are loaded once per process.

    A name spelled `module:object` needs no registration, so that a process of its own, as a worker, finds it too.
    """
    if name not in _made:
        target = _targets.get(name, name)
        if isinstance(target, str):
            target = _found(target)
        evaluator = target()
        if not isinstance(evaluator, Evaluator):
            raise TypeError(f"{name} made a {type(evaluator).__name__}, which lacks a part of Evaluator")
        if name in _targets and evaluator.name != name:
            raise ValueError(f"evaluator registered as {name!r} calls itself {evaluator.name!r}; accepted: one name")
        _made[name] = evaluator
    return _made[name]


def _found(target: str) -> Callable[[], Evaluator]:
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise UnknownEvaluator(f"evaluator is {target!r}; accepted: {', '.join(names())}, or module:object")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownEvaluator(f"evaluator is {target!r}, which cannot be found: {error}") from None
