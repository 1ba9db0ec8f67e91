"""Policies from other forms: what is computed, reused and scaled is what the other form says, step by step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocktune.policies import BlockPolicy, ModelIdentity, Plan, PolicyError, Reuse, ScaleText, Skip, apply_policy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

DOUBLE = ("full_attn", "full_ff", "full_ff_context")
SINGLE = ("single_attn", "single_proj_mlp", "single_proj_out")


def model(num_blocks: int) -> ModelIdentity:
    return ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=num_blocks, fingerprint="0" * 64)


def ecad(bits: np.ndarray, double: int, **more: Any) -> dict[str, Any]:
    """The file for `bits`, (steps, blocks, 3): whether each component is recomputed."""
    names = [(str(i), DOUBLE) for i in range(double)]
    names += [(f"single_{i}", SINGLE) for i in range(bits.shape[1] - double)]
    schedule = {
        f"{i:03}": {
            block: dict(zip(components, map(bool, row), strict=True))
            for (block, components), row in zip(names, step, strict=True)
        }
        for i, step in enumerate(bits)
    }
    counts = {"num_blocks": double, "num_inference_steps": len(bits), "num_single_blocks": bits.shape[1] - double}
    return {"cache_schedule": {**counts, "name": "gen_217", "attributes": {}, "schedule": schedule}, **more}


def written(folder: Path, content: Any) -> Path:
    path = folder / "ours_fast.json"
    path.write_text(json.dumps(content))
    return path


def computed(policy: BlockPolicy, num_steps: int) -> list[list[bool]]:
    kinds = Plan.compile(policy, num_steps).kinds
    assert {kind for step in kinds for kind in step} <= {"compute", "reuse"}
    return [[kind == "compute" for kind in step] for step in kinds]


first_computes = st.integers(1, 100).flatmap(
    lambda n: st.lists(st.booleans(), min_size=n, max_size=n).map(lambda mask: [True, *mask[1:]])
)
schedules = st.tuples(st.integers(1, 30), st.integers(0, 4), st.integers(0, 4)).filter(lambda s: s[1] + s[2] > 0)


# --- masks over steps ----------------------------------------------------------------------------------------------


@given(mask=first_computes, num_blocks=st.integers(1, 5))
def test_a_mask_is_obeyed_step_by_step(mask, num_blocks):
    policy = BlockPolicy.from_step_mask(model(num_blocks), mask)
    assert computed(policy, len(mask)) == [[value] * num_blocks for value in mask]
    assert policy.tuned_for == {"num_inference_steps": len(mask)}


def test_any_one_step_of_any_number_can_be_left_out():
    for num_steps in range(1, 101):
        for reused in range(1, num_steps):
            mask = [step != reused for step in range(num_steps)]
            assert computed(BlockPolicy.from_step_mask(model(1), mask), num_steps) == [[value] for value in mask]


def test_a_mask_survives_its_file(tmp_path):
    mask = [1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    policy = BlockPolicy.from_step_mask(model(3), mask)
    policy.save(tmp_path / "policy.json")
    assert computed(BlockPolicy.load(tmp_path / "policy.json"), len(mask)) == [[bool(value)] * 3 for value in mask]


def test_a_mask_may_be_an_array_and_may_compute_everything():
    assert BlockPolicy.from_step_mask(model(2), np.array([True, False, True])).rules == (
        BlockPolicy.from_step_mask(model(2), [1, 0, 1]).rules
    )
    assert BlockPolicy.from_step_mask(model(2), torch.tensor([1, 1])).rules == ()


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ([0, 1], "mask is [0, 1]; it must begin with 1"),
        ([], "mask is []; it must begin with 1"),
        ([1, 2], "mask[1] is 2; it must be 1 to compute that step or 0 to reuse"),
        ("10", "mask[0] is '1'"),
        ([1, None], "mask[1] is None"),
    ],
)
def test_masks_that_are_refused(mask, told):
    with pytest.raises(PolicyError) as refused:
        BlockPolicy.from_step_mask(model(2), mask)
    assert str(refused.value).startswith(told)


class WholeTransformer(nn.Module):
    """All blocks as one: it runs them, or adds to the image what they added together when they ran last (BudCache)."""

    def __init__(self, blocks: nn.ModuleList, mask: list[int]):
        super().__init__()
        self.blocks, self.mask, self.calls = blocks, mask, 0

    def forward(self, hidden_states, encoder_hidden_states, **kwargs):
        computes = self.mask[self.calls]
        self.calls += 1
        image = hidden_states
        if computes:
            for block in self.blocks:
                encoder_hidden_states, image = block(image, encoder_hidden_states, **kwargs)
            self.added = image - hidden_states
        return None, hidden_states + self.added


def run(pipe, steps: int, guidance: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(
            "a red fox", num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np",
            height=16, width=16, max_sequence_length=8,
        ).images
    )  # fmt: skip


def test_a_pipeline_obeys_a_mask_and_draws_what_caching_the_whole_transformer_draws(tiny_sd3_pipeline):
    mask = [1, 1, 0, 1, 0, 0, 1]
    pipe = tiny_sd3_pipeline()
    unmodified = run(pipe, len(mask))
    with apply_policy(pipe, BlockPolicy.from_step_mask(pipe, mask)) as applied:
        image = run(pipe, len(mask))
    assert applied.report.table == tuple((("compute" if value else "reuse"),) * 4 for value in mask)
    whole = WholeTransformer(pipe.transformer.transformer_blocks, mask)
    pipe.transformer.transformer_blocks = nn.ModuleList([whole])
    torch.testing.assert_close(image, run(pipe, len(mask)), atol=1e-5, rtol=0)
    assert (image - unmodified).abs().max() > 1e-3


# --- ECAD ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), size=schedules)
def test_a_schedule_of_whole_blocks_is_obeyed_block_by_block(data, size, tmp_path_factory):
    steps, double, single = size
    wanted = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=double + single, max_size=double + single), min_size=steps, max_size=steps
        )
    )
    wanted[0] = [True] * (double + single)
    bits = np.repeat(np.array(wanted)[:, :, None], 3, axis=2)
    path = written(tmp_path_factory.mktemp("ecad"), ecad(bits, double))
    policy = BlockPolicy.from_ecad(path, model(double + single))
    assert computed(policy, steps) == wanted
    assert policy == BlockPolicy.from_ecad(path, model(double + single), partial="compute")


@given(data=st.data(), size=schedules)
def test_blocks_recomputed_in_part_compute_when_asked_for(data, size, tmp_path_factory):
    steps, double, single = size
    count = steps * (double + single) * 3
    flat = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    bits = np.array(flat).reshape(steps, double + single, 3)
    bits[0, :, 1] = True
    path = written(tmp_path_factory.mktemp("ecad"), ecad(bits, double))
    policy = BlockPolicy.from_ecad(path, model(double + single), partial="compute")
    assert computed(policy, steps) == bits.any(2).tolist()
    mixed = int((bits.any(2) & ~bits.all(2)).sum())
    assert policy.evidence["source"]["partly_recomputed_block_calls"] == mixed
    if mixed:
        step, block = np.argwhere(bits.any(2) & ~bits.all(2))[0]
        name = str(block) if block < double else f"single_{block - double}"
        with pytest.raises(PolicyError, match=rf"Step {step:03}, block {name} recomputes .* and reuses "):
            BlockPolicy.from_ecad(path, model(double + single))


def test_a_schedule_brings_its_sampling_and_its_metrics(tmp_path):
    bits = np.ones((4, 3, 3), dtype=bool)
    bits[1:3] = False
    config = {"height": 256, "width": 256, "guidance_scale": 5}
    metrics = {"total_macs_T": 63.0, "latency": {"avg": 1016.6, "gpu": "NVIDIA RTX A6000"}}
    policy = BlockPolicy.from_ecad(written(tmp_path, ecad(bits, 2, config=config, metrics=metrics)), model(3))
    assert policy.name == "gen_217"
    assert policy.tuned_for == {"num_inference_steps": 4, **config}
    assert policy.evidence["source"]["their_metrics"] == metrics
    assert policy.evidence["source"]["file"] == "ours_fast.json"
    (rule,) = policy.rules
    assert (rule.blocks, rule.window, rule.action) == ((0, 1, 2), (0.25, 0.75), Reuse())


def test_a_pipeline_obeys_a_schedule(tmp_path, tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()
    whole = np.random.default_rng(0).random((6, 4)) < 0.5
    whole[0] = True
    policy = BlockPolicy.from_ecad(written(tmp_path, ecad(np.repeat(whole[:, :, None], 3, 2), 4)), pipe)
    with apply_policy(pipe, policy) as applied:
        run(pipe, 6)
    assert [[kind == "compute" for kind in step] for step in applied.report.table] == whole.tolist()


def changed(**changes: Any) -> Any:
    """A valid file of 3 steps, 2 double-stream and 1 single-stream blocks, with some entries put in or (None) out."""
    content = ecad(np.ones((3, 3, 3), dtype=bool), 2)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = content["cache_schedule"]
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return content


ONE = dict.fromkeys(DOUBLE, False)
FAULTS: dict[str, tuple[Any, str]] = {
    "blocks": (changed(num_blocks=1), "cache_schedule is for 1 double-stream and 1 single-stream blocks; the model"),
    "missing name": (changed(name=None), "cache_schedule.name is missing"),
    "no schedule": ({"cache_schedule": []}, "cache_schedule is []"),
    "not an object": ([], "EcadFile is []"),
    "step count": (changed(num_inference_steps=4), "cache_schedule.num_inference_steps is 4; its schedule has 3 steps"),
    "step name": (changed(schedule__002=None, schedule__003={}), "cache_schedule.schedule has '003'; known are 000, 0"),
    "unknown block": (changed(schedule__001__single_1={}), "Step 001 has 'single_1'; known are 0, 1, single_0"),
    "missing block": (changed(schedule__001__single_0=None), "Step 001 lacks single_0; it must have 0, 1, single_0"),
    "other model's component": (changed(schedule__001__1__attn2=True), "Step 001, block 1 has 'attn2'; known are full"),
    "missing component": (changed(schedule__001__1__full_ff=None), "Step 001, block 1 lacks full_ff"),
    "not a truth": (changed(schedule__001__1__full_ff="no"), "cache_schedule.schedule.001.1.full_ff is 'no'"),
    "reuse at first": (
        changed(schedule__000__1=ONE),
        "Step 000, block 1 recomputes nothing; there is nothing",
    ),
    "partial": (
        changed(schedule__002__0={**ONE, "full_ff": True}),
        "Step 002, block 0 recomputes full_ff and reuses full_attn, full_ff_context; here a block does either",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_schedules_that_are_refused(fault, tmp_path):
    content, told = FAULTS[fault]
    path = written(tmp_path, content)
    with pytest.raises(PolicyError) as refused:
        BlockPolicy.from_ecad(path, model(3))
    assert str(refused.value).startswith(f"{path}: {told}")


def test_a_schedule_that_is_no_file_or_a_word_that_is_no_way_to_round(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.json cannot be read"):
        BlockPolicy.from_ecad(tmp_path / "none.json", model(3))
    with pytest.raises(PolicyError, match="partial is 'skip'; it must be 'refuse' or 'compute'"):
        BlockPolicy.from_ecad(written(tmp_path, changed()), model(3), partial="skip")


# --- TexTailor -----------------------------------------------------------------------------------------------------


def test_ways_of_textailor():
    strengthened = BlockPolicy.from_textailor(model(24), [2, 7, 12], 1.5)
    (rule,) = strengthened.rules
    assert rule.action == ScaleText(operand="input", scale=1.5, scope="propagate", tokens="all")
    assert (rule.blocks, rule.window, rule.branch) == ((2, 7, 12), (0.0, 1.0), "both")
    each = BlockPolicy.from_textailor(model(24), [2, 7, 12], [2.0, 3.0, 2.0])
    assert [(r.blocks, r.action.scale) for r in each.rules] == [((2, 12), 2.0), ((7,), 3.0)]
    emptied = BlockPolicy.from_textailor(model(24), [3], way="empty")
    assert emptied.rules[0].action == ScaleText(operand="input", scale=0.0, scope="propagate")
    removed = BlockPolicy.from_textailor(model(24), [30 - 7, 5], way="remove")
    assert [(r.blocks, r.action) for r in removed.rules] == [((5, 23), Skip())]
    assert strengthened.tuned_for is None
    assert strengthened.evidence["source"]["layers"] == [2, 7, 12]


@pytest.mark.parametrize(("way", "scale", "factor"), [("strengthen", 2.0, 2.0), ("empty", None, 0.0)])
def test_text_is_scaled_as_by_a_hook_in_front_of_the_block(way, scale, factor, tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()
    unmodified = run(pipe, 3)
    with apply_policy(pipe, BlockPolicy.from_textailor(pipe, [1, 2], scale, way)):
        image = run(pipe, 3)

    def hook(block, args, kwargs):
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * factor}

    for layer in (1, 2):
        pipe.transformer.transformer_blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
    assert torch.equal(image, run(pipe, 3))
    assert not torch.equal(image, unmodified)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([24], 1.5), "layers is [24]; it must name blocks of this model, 0 to 23"),
        (([-1], 1.5), "layers is [-1]; it must name blocks of this model, 0 to 23"),
        (([], 1.5), "layers is []; it must name blocks"),
        (([3, 3], 1.5), "blocks is [3, 3]; each block may be named once"),
        (([3], -1.0), "scale is -1.0; it should be greater than or equal to 0"),
        (([3], float("nan")), "scale is nan; it should be a finite number"),
        (([3], None), "scale is None; 'strengthen' takes a number, or one for each of the layers"),
        (([3, 4], [1.5]), "scale is [1.5]; 'strengthen' takes a number, or one for each of the layers"),
        (([3], 1.5, "remove"), "scale is 1.5; 'remove' takes none"),
        (([3], 1.5, "empty"), "scale is 1.5; 'empty' takes none"),
        (([3], 1.5, "strong"), "way is 'strong'; it must be 'strengthen', 'empty' or 'remove'"),
    ],
)
def test_controllers_that_are_refused(arguments, told):
    with pytest.raises(PolicyError) as refused:
        BlockPolicy.from_textailor(model(24), *arguments)
    assert str(refused.value).startswith(told)
