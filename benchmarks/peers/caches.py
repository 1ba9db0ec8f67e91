"""Caches of other projects that decide while they run, as ways over a sweep of their settings.

diffusers' hooks serve Stable Diffusion 3, too, once two things that its pipeline does not bring are given to them: a
cache context, and text out of the last block, which returns none.
"""

import ast
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from typing import Any

from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from torch import nn

from ..workbench import Way, Workbench

# Whole sublayers, as the method's authors have it; diffusers' default is attention alone.
SUBLAYERS = [r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|img_mlp|txt_mlp)"]


@contextmanager
def _hooked(pipe: Any, apply: Callable[[nn.Module, Any], None], settings: Any) -> Iterator[None]:
    """While it lasts, diffusers' hooks of that cache are on the transformer, and begin anew with each run."""
    transformer = pipe.transformer
    contexts = hasattr(transformer, "cache_context")  # the pipeline names its calls by it

    def begin(*_: Any) -> None:
        if pipe.scheduler.step_index is None:
            HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks(recurse=True)
            if not contexts:
                _set_cache_context(transformer, CacheContext("both"))

    last = transformer.transformer_blocks[-1]
    if getattr(last, "context_pre_only", False):
        compute = last.forward

        def with_text(hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return encoder_hidden_states, compute(hidden_states, encoder_hidden_states, *args, **kwargs)[1]

        last.forward = with_text
    HookRegistry.check_if_exists_or_initialize(transformer)
    apply(transformer, settings)
    handle = transformer.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
        for module in transformer.modules():  # diffusers leaves its wrappers on the modules
            module.__dict__.pop("_diffusers_hook", None)
            module.__dict__.pop("forward", None)


@contextmanager
def _cache_dit(pipe: Any, steps: int, threshold: float, warmup: int) -> Iterator[None]:
    """DBCache of the package cache-dit with one block in front: the first block decides for the others."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    transformer = pipe.transformer
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, residual_diff_threshold=threshold,
        num_inference_steps=steps,
    )  # fmt: skip
    target = transformer
    if type(transformer).__name__ == "SD3Transformer2DModel":
        target = cache_dit.BlockAdapter(
            transformer=transformer, blocks=transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_1, check_forward_pattern=False,
        )  # fmt: skip
    cache_dit.enable_cache(target, cache_config=config)

    def begin(*_: Any) -> None:
        if pipe.scheduler.step_index is None:
            cache_dit.refresh_context(transformer, cache_config=config)

    handle = transformer.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
        cache_dit.disable_cache(target)


def mag_ratios(bench: Workbench) -> list[float]:
    """How much the residual of the transformer grows from step to step, by MagCache's own calibration."""
    settings = MagCacheConfig(calibrate=True, num_inference_steps=bench.steps)
    calibration = Way("MagCache", "", bench.steps, cache=partial(_hooked, apply=apply_mag_cache, settings=settings))
    told = io.StringIO()
    with redirect_stdout(told):
        bench.pictures(calibration, "search", bench.config.generation.batch)
    return ast.literal_eval(next(line for line in told.getvalue().splitlines() if line.startswith("[1.0")))


def ways(bench: Workbench) -> list[Way]:
    """Sweeps of first-block cache, TaylorSeer, MagCache and, where it is installed, cache-dit's DBCache."""
    steps = bench.steps
    made: list[Way] = []

    def add(method: str, name: str, apply: Callable[[nn.Module, Any], None], settings: Any) -> None:
        made.append(Way(method, name, steps, cache=partial(_hooked, apply=apply, settings=settings)))

    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        add("first-block cache", f"{threshold:g}", apply_first_block_cache, FirstBlockCacheConfig(threshold=threshold))
    for warmup in (4, steps // 2):
        for interval in (2, 3, 4):
            taylor = partial(TaylorSeerCacheConfig, cache_interval=interval, disable_cache_before_step=warmup)
            sublayers = taylor(cache_identifiers=SUBLAYERS)
            add("TaylorSeer", f"every {interval} from {warmup}", apply_taylorseer_cache, sublayers)
            lite = taylor(use_lite_mode=True)
            add("TaylorSeer", f"every {interval} from {warmup}, lite", apply_taylorseer_cache, lite)
    ratios = mag_ratios(bench)
    for threshold in (0.03, 0.045, 0.06, 0.12):
        for most in (2, 4):
            settings = MagCacheConfig(threshold, most, 0.2, steps, ratios)
            add("MagCache", f"{threshold:g}, at most {most}", apply_mag_cache, settings)
    if find_spec("cache_dit") is None:
        bench.say("cache-dit is not installed, so DBCache is left out")
    else:
        for warmup in (4, steps * 3 // 10, steps * 2 // 5):
            for threshold in (0.2, 0.4, 0.6):
                cache = partial(_cache_dit, steps=steps, threshold=threshold, warmup=warmup)
                made.append(Way("DBCache", f"{threshold:g} from {warmup}", steps, cache=cache))
    return made
