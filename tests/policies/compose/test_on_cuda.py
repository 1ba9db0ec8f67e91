"""On a GPU: weights that really move between devices and streams, attention by each of torch's kernels, bitsandbytes.

pytest -k cuda tests/policies runs these, and the kernels of `test_logits.py`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import BitsAndBytesConfig, SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.utils._pytree import tree_map_only

from ..by_hand import forward_as, keeping_residuals
from ..families import Family, stacked
from ..pipelines import flux_pipeline
from ..pipelines import generate as generate_flux
from .models import FAMILY, OFFLOADED, every_rule_acts, generate, policy_for

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# --- offloading --------------------------------------------------------------------------------------------------

# The first forward, in which diffusers learns the order of blocks for its prefetching, has all blocks above.
FROM_THE_START = [Rule(blocks=[1], action=Skip()), Rule(blocks=[2, 3], window=(0.25, 1), action=Reuse())]


def group(pipe: Any, **options: Any) -> None:
    """The transformer by groups, on a stream of their own; all else is on the GPU."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(DEVICE)
    streams = {"use_stream": DEVICE == "cuda"}
    pipe.transformer.enable_group_offload(torch.device(DEVICE), torch.device("cpu"), **options, **streams)


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device=DEVICE),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=DEVICE),
    "group by block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
    "group by leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
    "group by leaf, recorded": lambda pipe: group(pipe, offload_type="leaf_level", record_stream=DEVICE == "cuda"),
}


def homes(pipe: Any) -> set[str]:
    return {parameter.device.type for parameter in pipe.transformer.parameters()}


@pytest.mark.parametrize("rules", [OFFLOADED, FROM_THE_START], ids=["later", "from the start"])
@pytest.mark.parametrize("first", ["offload", "policy"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("cache_device", [None, "cpu"])
def test_offloaded_pipelines_obey_on_cuda(tiny_sd3_pipeline, offload, first, rules, cache_device):
    whole = tiny_sd3_pipeline().to(DEVICE)
    plain, policy = generate(whole), policy_for(whole, *rules)
    with apply_policy(whole, policy) as applied:
        expected, told = generate(whole), applied.report
    assert not torch.allclose(expected, plain, atol=1e-2)

    pipe = tiny_sd3_pipeline()
    if first == "offload":
        OFFLOADS[offload](pipe)
        torch.testing.assert_close(generate(pipe), plain, rtol=1e-4, atol=1e-4)
    applied = apply_policy(pipe, policy, cache_device=cache_device)
    if first == "policy":
        OFFLOADS[offload](pipe)
    for _ in range(2):
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
        assert applied.report == told
    assert homes(pipe) != {"cuda"}  # weights did leave
    applied.remove()
    torch.testing.assert_close(generate(pipe), plain, rtol=1e-4, atol=1e-4)


# --- attention ---------------------------------------------------------------------------------------------------

BACKENDS = ["native", "_native_flash", "_native_efficient", "_native_math", "_native_cudnn"]
NO_KERNEL = r"No available kernel|No viable backend|cuDNN"  # of torch, for a mask or a shape that its kernel lacks


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """diffusers keeps the backend that was set last as the one of every other model, too."""
    yield request.param
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


by_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def output(model: nn.Module, family: Family, dtype: torch.dtype, device: str) -> torch.Tensor:
    """In float64 on the CPU, of the family's inputs in `dtype` on `device`.

    Time and guidance are numbers that float16 has, times 1000 as well: rounded ones would be another step.
    """
    inputs = family.inputs(batch=1)
    inputs |= {"timestep": torch.full_like(inputs["timestep"], 0.5 if inputs["timestep"].max() <= 1 else 512)}
    inputs |= {"guidance": torch.full_like(inputs["guidance"], 4)} if "guidance" in inputs else {}
    inputs = tree_map_only(torch.Tensor, lambda t: t.to(device, dtype if t.dtype == torch.float64 else t.dtype), inputs)
    with torch.no_grad():
        return stacked(model(**inputs)).double().cpu()


@by_backend
@pytest.mark.parametrize("operand", ["key", "value", "logit"])
@pytest.mark.parametrize("name", ["flux-dev", "flux2", "chroma", "qwen-image", "hunyuan-image", "ltx", "wan"])
def test_text_scales_are_right_or_refused_on_cuda(backend, operand, name):
    """Against the same model in float64 on the CPU, where other tests hold them against the softmax written out."""
    family = FAMILY[name]
    if not family.hears(operand):
        pytest.skip(f"{name} refuses {operand}")
    exact = family.build()
    policy = policy_for(exact, Rule(blocks=range(len(family.slots)), action=ScaleText(operand=operand, scale=4.0)))
    plain = output(exact, family, torch.float64, "cpu")
    with apply_policy(exact, policy):
        expected = output(exact, family, torch.float64, "cpu")

    model = family.build().to(DEVICE, torch.float16)
    model.set_attention_backend(backend)
    try:
        rounded = output(model, family, torch.float16, DEVICE)
    except (RuntimeError, ValueError) as error:  # as it does without a policy; flash takes no mask
        with apply_policy(model, policy), pytest.raises((type(error), PolicyError)):
            output(model, family, torch.float16, DEVICE)
        return
    change = (expected - plain).norm()
    assert (rounded - plain).norm() < 0.1 * change  # what float16 and the kernel do is less than what the rule does
    with apply_policy(model, policy):
        try:
            got = output(model, family, torch.float16, DEVICE)
        except PolicyError:
            return
    assert (got - expected).norm() < 0.1 * change
    assert torch.equal(output(model, family, torch.float16, DEVICE), rounded)


@by_backend
def test_words_are_weighed_or_refused_on_cuda(backend):
    """A weight for each token takes a mask, which not every kernel does."""
    pipe = flux_pipeline()
    rule = Rule(blocks=range(6), action=ScaleText(operand="logit", scale=4.0, tokens=("cat",)))
    policy = policy_for(pipe, rule)
    # a pipeline rounds its times to float16, so kernels that take nothing else are held against another one's float16
    halved = backend in ("_native_flash", "_native_cudnn")
    if halved:
        pipe.to(DEVICE, torch.float16)
    plain = generate_flux(pipe)
    with apply_policy(pipe, policy):
        expected = generate_flux(pipe)
    change = (expected - plain).float().norm()
    pipe.to(DEVICE)
    pipe.transformer.set_attention_backend(backend)
    with apply_policy(pipe, policy):
        try:
            got = generate_flux(pipe)
        except (PolicyError, RuntimeError) as error:
            if not isinstance(error, PolicyError) and not re.search(NO_KERNEL, str(error)):
                raise
            return
    assert (got - expected.to(DEVICE)).float().norm() < (0.2 if halved else 0.01) * change


# --- quantisation ------------------------------------------------------------------------------------------------

QUANTISED = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16},
}


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.filterwarnings("ignore:::bitsandbytes")
def test_bitsandbytes_on_cuda(tiny_sd3_pipeline, tmp_path, weights):
    pytest.importorskip("bitsandbytes")
    pipe = tiny_sd3_pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = SD3Transformer2DModel.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**QUANTISED[weights]), torch_dtype=torch.float16
    )
    pipe.to(DEVICE, torch.float16)
    plain = generate(pipe)
    rules = [Rule(blocks=[1], action=ScaleText(operand=operand, scale=3)) for operand in ("key", "value", "logit")]
    assert every_rule_acts(lambda: generate(pipe), pipe, rules)
    block, container = pipe.transformer.transformer_blocks[1], FAMILY["sd3"].slots[1][0]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], window=(0.5, 1), action=Reuse()))):
        reused = generate(pipe)
    with forward_as(block, keeping_residuals(block, container, ["compute", "compute", "reuse", "reuse"])):
        torch.testing.assert_close(reused, generate(pipe))
    assert not torch.allclose(reused, plain, atol=1e-2)
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[1], action=Skip()))):
        skipped = generate(pipe)
    del pipe.transformer.transformer_blocks[1]
    torch.testing.assert_close(skipped, generate(pipe))
