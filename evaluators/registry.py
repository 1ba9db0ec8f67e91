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
    "clip_score:reference": "blocktune.reference.scorers:clip_score",
    "hps_v2.1:reference": "blocktune.reference.scorers:hps",
    "aesthetic_v2:reference": "blocktune.reference.scorers:aesthetic",
    "geneval-style:reference": "blocktune.reference.scorers:geneval",
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
# made with what follows the colon in their name: a checkpoint
_families: dict[str, str] = {
    "clip_score": "blocktune.evaluators.clip_scores:ClipScore",
    "siglip_score": "blocktune.evaluators.clip_scores:SiglipScore",
    "hps_v2.1": "blocktune.evaluators.clip_scores:HpsV21",
    "image_reward": "blocktune.evaluators.image_reward:ImageReward",
    "pick_score": "blocktune.evaluators.clip_scores:PickScore",
    "aesthetic_v1": "blocktune.evaluators.aesthetic:AestheticV1",
    "aesthetic_v2": "blocktune.evaluators.aesthetic:AestheticV2",
    "clip_iqa": "blocktune.evaluators.clip_iqa:ClipIqa",
    "vqa_score": "blocktune.evaluators.vqa:VqaScore",
    "vqa_attributes": "blocktune.evaluators.vqa:VqaAttributes",
    "lpips": "blocktune.evaluators.lpips:Lpips",
    "dinov2": "blocktune.evaluators.dinov2:DinoV2",
}
_made: dict[str, Evaluator] = {}


class UnknownEvaluator(ValueError):
    """No evaluator has that name."""


def names() -> tuple[str, ...]:
    """All registered names, sorted; those of families are not among them, for they download weights."""
    return tuple(sorted(_targets))


def families() -> tuple[str, ...]:
    """Names of scores by a pretrained model, sorted; a checkpoint may follow, as in `clip_score:ViT-B-32/openai`."""
    return tuple(sorted(_families))


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

    `FAMILY:CHECKPOINT` is made with the checkpoint, `FAMILY` with the published one where there is one. A name spelled
    `module:object` needs no registration, so that a process of its own, as a worker, finds it too.
    """
    if name not in _made:
        family, _, checkpoint = name.partition(":")
        if family in _families and name not in _targets:
            evaluator = _found(_families[family])(checkpoint)
        else:
            target = _targets.get(name, name)
            evaluator = (_found(target) if isinstance(target, str) else target)()
        if not isinstance(evaluator, Evaluator):
            raise TypeError(f"{name} made a {type(evaluator).__name__}, which lacks a part of Evaluator")
        if (name in _targets or family in _families) and evaluator.name != name:
            raise ValueError(f"evaluator registered as {name!r} calls itself {evaluator.name!r}; accepted: one name")
        _made[name] = evaluator
    return _made[name]


def _found(target: str) -> Callable[..., Evaluator]:
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise UnknownEvaluator(
            f"evaluator is {target!r}; accepted: {', '.join(names() + families())}, or module:object"
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownEvaluator(f"evaluator is {target!r}, which cannot be found: {error}") from None
