"""Pictures from a pipeline: the one function behind search, confirm, evaluate and generate."""

import inspect
import platform
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import pad

from ..evaluators import Prompt
from ..policies import BlockPolicy, apply_policy
from ..policies.policy import ModelIdentity
from .config import ConfigError, Generation
from .prefixes import Prefixes

# What `encode_prompt` of a pipeline class returns, by the name under which its call takes it; None is not taken.
_ENCODED: dict[str, tuple[str | None, ...]] = {
    "StableDiffusion3Pipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
}

_TEXTS = 32  # encoded at a time: T5 attends over 512 tokens of each, and a whole split would not fit beside a model

Rows: TypeAlias = dict[str, Any]  # arguments of a pipeline's call, a row per prompt


class BrokenPicture(RuntimeError):
    """The pipeline returned NaN or infinite pixels."""


def load(path: str, device: str, dtype: torch.dtype) -> Any:
    """The pipeline at `path` (`reference`: the bundled one), quiet, on `device`."""
    # here, for whoever starts workers imports this module and loads nothing: three seconds
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    if path == "reference":
        from ..reference import load_pipeline

        return load_pipeline(device, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path is {path!r}, which cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def read_identity(path: str, download: bool = True) -> ModelIdentity:
    """Which architecture the pipeline at `path` has, by its configs alone: no weights are read or downloaded.

    ConfigError where they cannot be had, without a `download` too where they do not lie on this machine.
    """
    import diffusers
    from accelerate import init_empty_weights

    if path == "reference":
        from ..reference.pipeline import WEIGHTS

        path = str(WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # diffusers' own, of arguments that the hub has given up
            index: Any = diffusers.DiffusionPipeline.load_config(path, local_files_only=not download)
            _, name = index["transformer"]
            transformer = getattr(diffusers, name)
            config = transformer.load_config(path, subfolder="transformer", local_files_only=not download)
    except (OSError, KeyError, AttributeError) as error:
        told = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.path is {path!r}, whose transformer cannot be told: {told}") from None
    with init_empty_weights():
        return ModelIdentity.of(transformer.from_config(config))


def device_name(device: str | torch.device) -> str:
    """What the numbers are of: the GPU, or the CPU and how many threads of it torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _accepted(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(call).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def _guidance(pipe: Any, generation: Generation) -> dict[str, float]:
    """Guidance under the name that the pipeline gives it; FLUX.1 takes its scale as an input of the model."""
    from diffusers import FluxPipeline

    true = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters and not isinstance(pipe, FluxPipeline)
    return {"true_cfg_scale" if true else "guidance_scale": generation.guidance_scale}


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts: texts are padded to the longest, and masked there, as a pipeline does within one call."""
    joined: Rows = {}
    for name in parts[0]:
        rows = [part[name] for part in parts]
        mask = name.endswith("_mask")
        if mask:  # of Qwen-Image, which has none where all texts of a call are as long
            texts = [part[name.removesuffix("_mask")] for part in parts]
            whole = [torch.ones(text.shape[:2], dtype=torch.long, device=text.device) for text in texts]
            rows = [ones if row is None else row for row, ones in zip(rows, whole, strict=True)]
        if rows[0] is None:
            continue
        longest = max(row.shape[1] for row in rows)
        every = torch.cat([pad(row, (0, 0) * (row.ndim - 2) + (0, longest - row.shape[1])) for row in rows])
        if not (mask and every.all()):
            joined[name] = every
    return joined


@torch.inference_mode()
def embed(pipe: Any, texts: Sequence[str], generation: Generation) -> Rows:
    """What the pipeline's call takes for `texts`: their embeddings, made once, or where these are not known the texts.

    A pipeline with true guidance in a call of its own (Qwen-Image) is guided away from an empty prompt.
    """
    names = _ENCODED.get(type(pipe).__name__)
    guided = generation.guidance_scale > 1
    true = "true_cfg_scale" in _guidance(pipe, generation)
    if names is None:
        return {"prompt": list(texts)} | ({"negative_prompt": [" "] * len(texts)} if true and guided else {})

    def encoded(prompts: list[str], side: str) -> Rows:
        parts: list[Rows] = []
        for start in range(0, len(prompts), _TEXTS):
            arguments = {
                "prompt": prompts[start : start + _TEXTS], "prompt_2": None, "prompt_3": None,
                "do_classifier_free_guidance": guided, "max_sequence_length": generation.max_sequence_length,
            }  # fmt: skip
            returned = pipe.encode_prompt(**_accepted(pipe.encode_prompt, arguments))
            parts.append({side + name: rows for name, rows in zip(names, returned, strict=True) if name})
        return _joined(parts)

    rows = encoded(list(texts), "")
    return rows | encoded([" "] * len(texts), "negative_") if true and guided else rows


def some(rows: Rows, part: slice) -> Rows:
    """The rows of some of the prompts."""
    return {name: values[part] for name, values in rows.items()}


def generate(
    pipe: Any,
    prompts: Sequence[Prompt],
    rows: Rows,
    generation: Generation,
    policy: BlockPolicy | None = None,
    prefixes: Prefixes | None = None,
    seen: Callable[[int, np.ndarray], None] | None = None,
    kept: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Pictures of `prompts`, whose `rows` `embed` made, each from its own seed: uint8 `(n, height, width, 3)`.

    Noise is drawn on the CPU per picture, so a picture does not depend on the device or on its neighbours but for
    rounding. With `prefixes`, steps that earlier runs of this pipeline took alike are not computed again. `seen` is
    called with each batch as soon as it is made, and where it begins; `kept` with the bytes that residuals took at most
    in the run of a batch, which is a part of one where `prefixes` know its beginning. Raises BrokenPicture for pixels
    that are not finite.
    """
    parts = []
    for start in range(0, len(prompts), generation.batch):
        part = slice(start, start + generation.batch)
        seeds = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts[part]]
        arguments = {
            "num_inference_steps": generation.num_inference_steps, "generator": seeds, "height": generation.height,
            "width": generation.width, "output_type": "pt", "max_sequence_length": generation.max_sequence_length,
        }  # fmt: skip
        arguments |= some(rows, part) | _guidance(pipe, generation)
        applied = apply_policy(pipe, policy) if policy is not None and policy.acts else nullcontext()
        run = repr((generation, prompts[part]))
        with applied as acting, prefixes.shared(pipe, acting, run) if prefixes else nullcontext():
            pixels = pipe(**_accepted(pipe.__call__, arguments)).images
        if kept and acting:
            kept(acting.report.cache_bytes)
        if not torch.isfinite(pixels).all():
            raise BrokenPicture("the pipeline returned pixels that are NaN or infinite")
        parts.append((pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu().numpy())
        if seen:
            seen(start, parts[-1])
    return np.concatenate(parts)
