"""What else may act on a model's blocks (caches, parallelism, offloading), and what a policy cannot do beside it.

diffusers' own neighbours are known by the hooks that they put on modules, however they were put there; cache-dit by
the mark that it leaves on the transformer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .architectures import Slot
from .error import PolicyError
from .policy import BlockPolicy, Reuse, Rule, ScaleText, Skip

# Caches that decide by what the first block changed, and keep what the last one returned.
_BY_FIRST_BLOCK = {
    "fbc_leader_block_hook": "FirstBlockCache",
    "mag_cache_leader_block_hook": "MagCache",
    "sea_cache_leader_block": "SeaCache",
}
# Caches that answer for attentions, or other parts of blocks, and count how often each was called.
_BY_CALLS = {
    "taylorseer_cache": "TaylorSeerCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "faster_cache_denoiser": "FasterCache",
}


def refuse_neighbours(transformer: nn.Module, policy: BlockPolicy, slots: Sequence[Slot]) -> None:
    """PolicyError where a rule and what else acts on the transformer would disturb each other silently."""
    acting = [(i, rule) for i, rule in enumerate(policy.rules) if rule.acts]
    if not policy.acts:
        return
    hooks = {name for module in transformer.modules() for name in _hooks(module)}
    caches = [(name, cache) for name, cache in (_BY_FIRST_BLOCK | _BY_CALLS).items() if name in hooks]
    ends = {0, len(slots) - 1}
    if policy.guides_in_part and (caches or getattr(transformer, "_is_cached", False)):
        cache = caches[0][1] if caches else "cache-dit"
        raise PolicyError(
            f"guidance_window is {list(policy.guidance_window)}, and {cache} keeps what both halves of guidance gave; "
            "take that off or leave the window out."
        )
    for i, rule in acting:
        reasons = [_beside_first_block(cache, rule, ends) for name, cache in caches if name in _BY_FIRST_BLOCK]
        reasons += [_beside_counting(cache, rule) for name, cache in caches if name in _BY_CALLS]
        if getattr(transformer, "_is_cached", False):
            reasons.append("acts on blocks, and cache-dit decides at each step which of them are called")
        if any(name.startswith("cp_") for name in hooks):
            reasons.append(_beside_parallel(rule, slots))
        if "group_offloading" in hooks:
            reasons.append(_beside_offloading(rule, slots))
        runs_again = torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False)
        if runs_again and isinstance(rule.action, Reuse):
            reasons.append("reuses, and gradient checkpointing would run the block again with a later residual")
        for reason in reasons:
            if reason is not None:
                raise PolicyError(f"rules[{i}] {reason}; take that off or leave the rule out.")


def _hooks(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    return getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})


def _beside_first_block(cache: str, rule: Rule, ends: set[int]) -> str | None:
    if isinstance(rule.action, Reuse):
        return f"reuses, and {cache} would have it keep what the cache made up"
    if isinstance(rule.action, Skip) and ends & set(rule.blocks):
        return f"skips block {min(ends & set(rule.blocks))}, by which {cache} decides"
    return None


def _beside_counting(cache: str, rule: Rule) -> str | None:
    if isinstance(rule.action, Reuse):
        return f"reuses, and {cache} counts the calls of each block"
    if isinstance(rule.action, Skip) and rule.window != (0.0, 1.0):
        return f"skips in a window, and {cache} counts the calls of each block"
    if isinstance(rule.action, ScaleText) and rule.action.operand != "input":
        return f"scales the text's {rule.action.operand}, and {cache} answers for attentions without calling them"
    by_row = isinstance(rule.action, ScaleText) and (rule.branch != "both" or rule.action.tokens != "all")
    if by_row and cache == "FasterCache":
        return f"scales text row by row, and {cache} takes rows out of the batch; scale all tokens of both branches"
    return None


def _beside_parallel(rule: Rule, slots: Sequence[Slot]) -> str | None:
    if isinstance(rule.action, ScaleText):
        return "scales text, whose tokens context parallelism deals out to several devices"
    for block in rule.blocks:
        for name, hook in _hooks(slots[block].block).items():
            if name.startswith("cp_input") and not {"hidden_states", "encoder_hidden_states"}.isdisjoint(hook.metadata):
                return f"leaves out block {block}, where context parallelism deals the tokens out"
    return None


def _beside_offloading(rule: Rule, slots: Sequence[Slot]) -> str | None:
    if isinstance(rule.action, ScaleText):
        return None
    for block in rule.blocks:
        hook = _hooks(slots[block].block).get("group_offloading")
        group = None if hook is None or len(hook.group.modules) < 2 else hook.group
        if group is not None and slots[block].block in (group.onload_leader, group.offload_leader):
            return f"leaves out block {block}, which moves the weights of a group of blocks (num_blocks_per_group)"
    return None
