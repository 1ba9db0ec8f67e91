"""What else may act on a model's blocks, caches and context parallelism, and what a policy cannot do beside it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .architectures import Slot
from .error import PolicyError
from .policy import BlockPolicy, Reuse, ScaleText, Skip

# Caches that decide by what the first block changed, and read what the last one returned.
_BY_FIRST_BLOCK = ("FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig")


def refuse_neighbours(transformer: nn.Module, policy: BlockPolicy, slots: Sequence[Slot]) -> None:
    """PolicyError where a rule and what else acts on the transformer would disturb each other silently."""
    cache = getattr(transformer, "_cache_config", None)
    parallel = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    if cache is None and parallel is None:
        return
    for i, rule in enumerate(policy.rules):
        if not rule.acts:
            continue
        if cache is not None:
            reason = _beside_cache(type(cache).__name__, rule, len(slots))
            if reason:
                raise PolicyError(f"rules[{i}] {reason}; call transformer.disable_cache() or leave the rule out.")
        if parallel is not None:
            reason = _beside_parallel(rule, slots)
            if reason:
                raise PolicyError(f"rules[{i}] {reason}; leave the rule out under context parallelism.")


def _beside_cache(cache: str, rule: Any, num_blocks: int) -> str | None:
    if isinstance(rule.action, Reuse):
        return f"reuses, and {cache} would have it keep what the cache made up"
    if isinstance(rule.action, Skip):
        if cache in _BY_FIRST_BLOCK and {0, num_blocks - 1} & set(rule.blocks):
            return f"skips the first or the last block, by which {cache} decides"
        if cache not in _BY_FIRST_BLOCK and rule.window != (0.0, 1.0):
            return f"skips in a window, and {cache} counts the calls of each block"
    return None


def _beside_parallel(rule: Any, slots: Sequence[Slot]) -> str | None:
    if isinstance(rule.action, ScaleText):
        return "scales text, whose tokens are dealt out to several devices"
    for block in rule.blocks:
        registry = getattr(slots[block].block, "_diffusers_hook", None)
        if registry is not None and any(name.startswith("cp_") for name in registry.hooks):
            return f"leaves out block {block}, which deals the tokens out"
    return None
