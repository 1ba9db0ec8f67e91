"""Pictures from a pipeline: the one function behind search, confirm, evaluate and generate."""

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..evaluators import Prompt
from ..policies import BlockPolicy, apply_policy
from .config import ConfigError, Generation

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class BrokenPicture(RuntimeError):
    """The pipeline returned NaN or infinite pixels."""


def load(path: str, device: str, dtype: torch.dtype) -> Any:
    """The pipeline at `path` (`reference`: the bundled one), quiet, on `device`."""
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


def device_name(device: str | torch.device) -> str:
    """What the numbers are of: the GPU, or the CPU and how many threads of it torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@torch.inference_mode()
def embed(pipe: Any, texts: Sequence[str], generation: Generation) -> dict[str, torch.Tensor]:
    """Text embeddings of SD3, rows in the order of `texts`: what its call takes instead of prompts."""
    encoded = pipe.encode_prompt(
        list(texts),
        None,
        None,
        do_classifier_free_guidance=generation.guidance_scale > 1,
        max_sequence_length=generation.max_sequence_length,
    )
    return {name: rows for name, rows in zip(_EMBEDS, encoded, strict=True) if rows is not None}


def generate(
    pipe: Any,
    prompts: Sequence[Prompt],
    embeddings: dict[str, torch.Tensor],
    generation: Generation,
    steps: int,
    policy: BlockPolicy | None = None,
) -> np.ndarray:
    """Pictures of `prompts`, each from its own seed: uint8 `(n, height, width, 3)`.

    Noise is drawn on the CPU per picture, so a picture does not depend on the device or on its neighbours but for
    rounding. Raises BrokenPicture for pixels that are not finite.
    """
    parts = []
    for start in range(0, len(prompts), generation.batch):
        rows = slice(start, start + generation.batch)
        seeds = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts[rows]]
        with apply_policy(pipe, policy) if policy is not None and policy.rules else nullcontext():
            pixels = pipe(
                **{name: tensor[rows] for name, tensor in embeddings.items()},
                num_inference_steps=steps, guidance_scale=generation.guidance_scale, generator=seeds,
                height=generation.height, width=generation.width, output_type="pt",
                max_sequence_length=generation.max_sequence_length,
            ).images  # fmt: skip
        if not torch.isfinite(pixels).all():
            raise BrokenPicture("the pipeline returned pixels that are NaN or infinite")
        parts.append((pixels.permute(0, 2, 3, 1).float() * 255).round().to("cpu", torch.uint8).numpy())
    return np.concatenate(parts)
