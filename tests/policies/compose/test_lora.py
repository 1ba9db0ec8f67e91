"""LoRA adapters around and under a policy: every change of the weights is heard, and the policy still acts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from blocktune.policies import Reuse, Rule, ScaleText, Skip, apply_policy

from .models import every_rule_acts, generate, policy_for

peft = pytest.importorskip("peft")

RULES = [
    Rule(blocks=[0], branch="cond", action=ScaleText(operand="logit", scale=1.7)),
    Rule(blocks=[1], action=Reuse(every=2)),
    Rule(blocks=[2], action=Skip()),
    Rule(blocks=[3], action=ScaleText(operand="value", scale=1.7)),
]


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Rank 2, on the image's queries and the text's values of every block, as `load_lora_weights` takes them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.transformer_blocks.{block}.attn.{layer}.lora_{half}.weight": torch.randn(
            *shape, generator=generator
        )
        for block in range(4)
        for layer in ("to_q", "add_v_proj")
        for half, shape in (("A", (2, 32)), ("B", (32, 2)))
    }


def by_hand(pipe: Any, scales: dict[int, float]) -> Any:
    """The same as scaled adapters of these seeds, added to the weights of a fresh pipeline."""
    for seed, scale in scales.items():
        lora = weights(seed)
        for name, down in lora.items():
            if ".lora_A." in name:
                layer = pipe.transformer.get_submodule(name.removeprefix("transformer.").partition(".lora_")[0])
                with torch.no_grad():
                    layer.weight += scale * lora[name.replace("lora_A", "lora_B")] @ down
    return pipe


# What is done to a pipeline one after the other, and the scales of both adapters after it.
ROAD: list[tuple[str, Callable[[Any], Any], dict[int, float]]] = [
    ("nothing", lambda pipe: None, {}),
    ("load", lambda pipe: pipe.load_lora_weights(weights(1), adapter_name="one"), {1: 1.0}),
    ("load another", lambda pipe: pipe.load_lora_weights(weights(2), adapter_name="two"), {2: 1.0}),
    ("set both", lambda pipe: pipe.set_adapters(["one", "two"], [0.3, 0.7]), {1: 0.3, 2: 0.7}),
    ("disable", lambda pipe: pipe.disable_lora(), {}),
    ("enable", lambda pipe: pipe.enable_lora(), {1: 0.3, 2: 0.7}),
    ("fuse", lambda pipe: pipe.fuse_lora(), {1: 0.3, 2: 0.7}),
    ("unfuse", lambda pipe: pipe.unfuse_lora(), {1: 0.3, 2: 0.7}),
    ("delete one", lambda pipe: pipe.delete_adapters("one"), {2: 0.7}),
    ("unload", lambda pipe: pipe.unload_lora_weights(), {}),
]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_every_change_of_adapters_under_a_policy(tiny_sd3_pipeline):
    pipe, seen = tiny_sd3_pipeline(), []
    policy = policy_for(pipe, *RULES)
    with apply_policy(pipe, policy) as applied:
        for name, change, scales in ROAD:
            change(pipe)
            merged = by_hand(tiny_sd3_pipeline(), scales)
            with apply_policy(merged, policy):
                expected = generate(merged)
            torch.testing.assert_close(
                generate(pipe), expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (applied.report.skipped, applied.report.reused) == (4, 2)
            assert not torch.allclose(generate(merged), expected, atol=1e-2)
            seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert not torch.allclose(seen[2], seen[3], atol=1e-2)
    torch.testing.assert_close(generate(pipe), generate(tiny_sd3_pipeline()))


@pytest.mark.parametrize("fused", [False, True])
def test_policy_on_and_off_around_adapters(tiny_sd3_pipeline, fused):
    pipe = tiny_sd3_pipeline()
    pipe.load_lora_weights(weights(1), adapter_name="one")
    if fused:
        pipe.fuse_lora()
    with_adapter = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *RULES)):
        under_both = generate(pipe)
    assert torch.equal(generate(pipe), with_adapter)
    assert not torch.allclose(under_both, with_adapter, atol=1e-2)
    assert every_rule_acts(lambda: generate(pipe), pipe, RULES)
    if fused:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), generate(tiny_sd3_pipeline()))


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_adapters_loaded_under_offload_and_a_policy(tiny_sd3_pipeline, monkeypatch, offload):
    """diffusers takes accelerate's hooks off and puts them on again meanwhile; here with the CPU as the device."""
    merged = by_hand(tiny_sd3_pipeline(), {1: 1.0})
    policy = policy_for(merged, *RULES)
    with apply_policy(merged, policy):
        expected = generate(merged)
    pipe = tiny_sd3_pipeline()
    ways = {
        "enable_model_cpu_offload": partial(pipe.enable_model_cpu_offload, device="cpu"),
        "enable_sequential_cpu_offload": lambda: cpu_offload(pipe.transformer, torch.device("cpu")),
    }
    monkeypatch.setattr(pipe, offload, ways[offload])
    ways[offload]()
    with apply_policy(pipe, policy):
        pipe.load_lora_weights(weights(1), adapter_name="one")
        assert hasattr(pipe.transformer, "_hf_hook")
        for _ in range(2):
            torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


def test_adapters_trained_under_a_policy(tiny_sd3_pipeline, tmp_path: Path):
    """`add_adapter`: the adapter of a skipped block gets no gradient, that of a scaled one does."""
    pipe = tiny_sd3_pipeline()
    model = pipe.transformer
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    inputs = {
        "hidden_states": torch.ones(2, 4, 8, 8),
        "encoder_hidden_states": torch.ones(2, 7, 32),
        "pooled_projections": torch.ones(2, 32),
        "timestep": torch.ones(2),
    }
    rules = [Rule(blocks=[2], action=Skip()), Rule(blocks=[0], action=ScaleText(operand="key", scale=1.7))]
    with apply_policy(model, policy_for(model, *rules)):
        model(**inputs).sample.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {int(name.split(".")[1]) for name, grad in grads.items() if grad is not None} == {0, 1, 3}
    model.save_lora_adapter(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
