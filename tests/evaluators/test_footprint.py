import pytest
import torch
from blocktune.evaluators import count_flops, peak_memory
from blocktune.policies import BlockPolicy, Reuse, Rule, Skip, apply_policy


def test_flops_of_a_matrix_product_and_a_convolution():
    linear, convolution = torch.nn.Linear(32, 48, bias=False), torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert count_flops(lambda: linear(torch.ones(5, 32))) == 2 * 5 * 32 * 48
    assert count_flops(lambda: convolution(torch.ones(1, 3, 16, 16))) == 2 * 16 * 16 * 3 * 9 * 8
    assert count_flops(lambda: torch.ones(3) + 1) == 0


def test_a_skipped_block_saves_its_share(tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()

    def run():
        pipe("a red circle", height=16, width=16, num_inference_steps=4, output_type="latent")

    def flops_with(*rules: Rule) -> int:
        with apply_policy(pipe, BlockPolicy.for_model(pipe, "test", rules)):
            return count_flops(run)

    everything = count_flops(run)
    skipped, reused = (flops_with(Rule(blocks=[1], action=action)) for action in (Skip(), Reuse(every=2)))
    assert flops_with() == everything
    assert skipped < reused < everything
    assert everything - skipped == 2 * (everything - reused)  # of 4 steps one action saves 4, the other 2
    assert flops_with(Rule(blocks=[1, 2], action=Skip())) == everything - 2 * (everything - skipped)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: torch counts its memory")
def test_peak_memory_needs_a_gpu():
    with pytest.raises(ValueError, match="device is cpu"):
        peak_memory(lambda: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch counts no memory")
def test_peak_memory_counts_what_was_held_at_once():
    held = peak_memory(lambda: None)
    more = peak_memory(lambda: [torch.ones(1 << 20, device="cuda") for _ in range(3)]) - held
    assert more == pytest.approx(3 * 4 * 2**20, rel=0.01)
