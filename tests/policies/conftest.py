"""What the tests of policies share."""

import ipaddress
import socket
from typing import Any

import pytest
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from torch import nn

from .families import Family
from .pipelines import flux_pipeline, qwen_image_pipeline, with_t5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of policies reaches for another machine; not an OSError, from which libraries would fall back."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "localhost":
            assert ipaddress.ip_address(address[0]).is_loopback, f"a test reaches for {address[0]}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


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
