"""What the tests of policies share."""

import pytest
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from torch import nn

from .families import Family
from .pipelines import flux_pipeline, qwen_image_pipeline, with_t5


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    """The transformer of a family, one for all tests of a module: they leave it as they found it."""
    return family.build()


@pytest.fixture(scope="session")
def tiny_flux_pipeline() -> FluxPipeline:
    return flux_pipeline()


@pytest.fixture(scope="session")
def tiny_qwen_image_pipeline() -> QwenImagePipeline:
    return qwen_image_pipeline()


@pytest.fixture(scope="session")
def tiny_sd3_t5_pipeline(tiny_sd3_pipeline) -> StableDiffusion3Pipeline:
    return with_t5(tiny_sd3_pipeline(num_layers=3))
