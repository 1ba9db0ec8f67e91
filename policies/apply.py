"""`apply_policy`: a diffusers pipeline, or its transformer, made to obey a policy; and what is refused then."""

from typing import Any, Literal

from torch import nn

from . import clock
from .applied import APPLIED, Applied
from .architectures import Architecture, Slot, block_slots, resolve
from .error import PolicyError
from .policy import BlockPolicy, ModelIdentity, Rule, ScaleText


def apply_policy(
    pipe_or_transformer: Any,
    policy: BlockPolicy,
    *,
    scheduler: Any = None,
    cache_device: Literal["cpu"] | None = None,
) -> Applied:
    """Makes a diffusers pipeline, or its transformer alone, obey `policy` from now on.

    Use it as a context manager or call `.remove()`; `.report` tells what the last run did. A policy that changes
    nothing is bit-identical to none. The step is read from the scheduler: the pipeline's own, or `scheduler` for a bare
    transformer, which needs it for windows and reuse. Residuals kept for reuse stay on the device that made them, or
    in main memory with `cache_device="cpu"`: slower, and for models whose residuals do not fit (`report.cache_bytes`).
    Raises PolicyError when the policy is for another model, or asks for what the pipeline cannot tell or do.
    """
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    transformer, architecture = resolve(pipe_or_transformer)
    if pipe is not None and scheduler is not None:
        raise PolicyError("scheduler is for a bare transformer; a pipeline brings its own.")
    if cache_device not in (None, "cpu"):
        raise PolicyError(f"cache_device is {cache_device!r}; it must be None or 'cpu'.")
    if getattr(pipe, "transformer_2", None) is not None:
        raise PolicyError(
            f"{type(pipe).__name__} has a second transformer (transformer_2); apply a policy to each by itself, with "
            "scheduler=pipe.scheduler."
        )
    policy.refuse_other_model(ModelIdentity.of(transformer))
    slots = block_slots(transformer, architecture)
    for i, rule in enumerate(policy.rules):
        if rule.acts:
            reason = _refuse_branch(rule, architecture, pipe) or _refuse_text(
                rule, architecture, transformer, slots, pipe
            )
            if reason:
                raise PolicyError(f"rules[{i}].{reason}")
    if policy.guides_in_part:
        _refuse_guidance_window(policy, architecture, pipe)
    clock.refuse_without_steps(policy, scheduler if pipe is None else pipe.scheduler)
    if transformer in APPLIED:
        raise PolicyError(f"Policy {APPLIED[transformer]!r} is already applied to this transformer; remove it first.")
    called = pipe_or_transformer if pipe is None else pipe.transformer
    return Applied(policy, called, architecture, pipe, scheduler, cache_device == "cpu")


def _refuse_guidance_window(policy: BlockPolicy, architecture: Architecture, pipe: Any) -> None:
    told = f"guidance_window is {list(policy.guidance_window)}"
    if architecture.truncated_by:
        raise PolicyError(
            f"{told}; pipelines of {architecture.transformer} end guidance by their own {architecture.truncated_by}, "
            "so use that and leave the window out."
        )
    if _halves_unknown(architecture, pipe):
        raise PolicyError(f"{told}; {_HALVES}, so apply to that or leave the window out.")


# What tells the halves of guidance apart.
_HALVES = (
    "a half of guidance can be told only with a pipeline that has do_classifier_free_guidance or makes a call for each"
)


def _halves_unknown(architecture: Architecture, pipe: Any) -> bool:
    batched = architecture.guidance == "batched"
    return pipe is None or (batched and not hasattr(type(pipe), "do_classifier_free_guidance"))


def _refuse_branch(rule: Rule, architecture: Architecture, pipe: Any) -> str | None:
    if rule.branch == "both":
        return None
    if architecture.guidance == "batched" and not isinstance(rule.action, ScaleText):
        return (
            f"branch is {rule.branch!r} on a {rule.action.type}; {architecture.transformer} runs both halves of "
            "guidance in one call, so a block can be left out for both halves only."
        )
    if _halves_unknown(architecture, pipe):
        return f"branch is {rule.branch!r}; {_HALVES}, so apply to that or use 'both'."
    return None


def _refuse_text(rule: Rule, architecture: Architecture, transformer: Any, slots: list[Slot], pipe: Any) -> str | None:
    action, name = rule.action, architecture.transformer
    if not isinstance(action, ScaleText):
        return None
    field = architecture.image_in_text
    if field and transformer.config.get(field) is not None:
        return (
            f"action scales text; where {name} has {field}, image tokens stand in its text, which cannot be told apart."
        )
    for streams in {slots[block].kind.streams for block in rule.blocks}:
        if streams == "mixed":
            return f"action scales text; {name} holds text and image in one stream with no locator of the text."
        if streams == "image" and action.operand == "logit":
            return (
                f"action.operand is 'logit'; the image tokens of {name} attend to text apart from the image, where it "
                "would change nothing; use 'key' or 'value'."
            )
        if streams == "image" and action.scope == "propagate":
            return (
                f"action.scope is 'propagate'; every block of {name} hears the same text, which no block changes; use "
                "scope 'local'."
            )
    if action.tokens != "all" and pipe is None:
        return f"action.tokens is {action.tokens!r}; tokens are located with a pipeline's tokenizers, so apply to that."
    return None
