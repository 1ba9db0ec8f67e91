"""What tests of several rooms share."""

from collections.abc import Callable

import pytest
from diffusers import StableDiffusion3Pipeline


@pytest.fixture(scope="session")
def tiny_sd3_pipeline() -> Callable[..., StableDiffusion3Pipeline]:
    """The builder: `tiny_sd3_pipeline(num_layers=4, qk_norm=None, dual_attention_layers=(), seed=0)`."""
    from .policies.pipelines import sd3_pipeline  # here: it imports all of diffusers' families

    return sd3_pipeline
