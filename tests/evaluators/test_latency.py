import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blocktune.evaluators import CostTable, measure_cost_table, speedup, time_pipeline, time_runs
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from blocktune.policies.architectures import ARCHITECTURES, Architecture, Blocks
from blocktune.policies.attention import ScaledAttention
from blocktune.policies.plan import Plan
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ..policies.pipelines import qwen_image_pipeline

BLOCKS, STEPS, IMAGES = 4, 5, 2


@pytest.fixture(scope="module")
def pipe(tiny_sd3_pipeline):
    return tiny_sd3_pipeline(num_layers=BLOCKS)


def generate(pipe, steps: int = STEPS, guidance: float = 4.0):
    text, pooled = (torch.ones(IMAGES, *shape, device=pipe.device) for shape in ((8, 32), (32,)))
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=0 * text,
        negative_pooled_prompt_embeds=0 * pooled,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="np",
    )


@pytest.fixture(scope="module")
def table(pipe) -> CostTable:
    return measure_cost_table(pipe, lambda: generate(pipe), repeats=3)


def kinds(kind: str, steps: int = STEPS) -> list[list[str]]:
    return [[kind] * BLOCKS for _ in range(steps)]


def test_says_what_was_measured(table):
    assert (table.steps, table.repeats, table.batch, table.rows) == (STEPS, 3, IMAGES, 2 * IMAGES)
    assert (table.height, table.width, table.dtype) == (16, 16, "float32")
    assert table.threads == torch.get_num_threads()
    assert table.device
    assert len(table.block_compute) == len(table.block_reuse) == BLOCKS
    assert all(c > r > 0 for c, r in zip(table.block_compute, table.block_reuse, strict=True))
    assert table.block_skip == 0
    assert table.run_overhead > 0


def test_all_computed_is_the_measured_run(table):
    assert table.predict(kinds("compute")) == pytest.approx(table.run_seconds, rel=1e-9)


def test_only_the_steps_scale_with_their_number(table):
    one, two, six = (table.predict(kinds("compute", n)) for n in (1, 2, 6))
    assert two - one == pytest.approx(table.step_overhead + sum(table.block_compute))
    assert six - one == pytest.approx(5 * (two - one))
    assert table.predict([]) == table.run_overhead
    assert table.predict([[], [], *kinds("compute", 2)]) == two  # a run that starts at its third step


def test_fewer_computed_blocks_cost_less(table):
    plan = kinds("compute")
    seconds = [table.predict(plan)]
    for step in range(STEPS):
        for block in range(BLOCKS):
            plan[step][block] = "reuse"
            seconds.append(table.predict(plan))
    for step in range(STEPS):
        for block in range(BLOCKS):
            plan[step][block] = "skip"
            seconds.append(table.predict(plan))
    assert all(later < earlier for earlier, later in pairwise(seconds))
    assert seconds[-1] == pytest.approx(table.run_overhead + STEPS * table.step_overhead)


def test_predicts_a_plan(pipe, table):
    policy = BlockPolicy.for_model(
        pipe,
        name="late reuse",
        rules=[Rule(blocks=[1, 2], window=(0.4, 1.0), action=Reuse(every=3)), Rule(blocks=[3], action=Skip())],
    )
    plan = Plan.compile(policy, STEPS)
    counts = plan.counts()
    assert counts.reused > 0
    assert counts.skipped == STEPS
    saved = sum(
        table.block_compute[block] - (table.block_reuse[block] if kind == "reuse" else 0)
        for row in plan.work
        for block, kind in enumerate(row)
        if kind != "compute"
    )
    assert table.predict(plan.work) == pytest.approx(table.run_seconds - saved)


def test_json_round_trip(table):
    assert CostTable.model_validate_json(table.model_dump_json()) == table
    with pytest.raises(ValidationError, match="unknown"):
        CostTable.model_validate({**table.model_dump(), "unknown": 1})
    with pytest.raises(ValidationError, match="step_overhead"):
        CostTable.model_validate({**table.model_dump(), "step_overhead": float("nan")})
    with pytest.raises(ValidationError, match="4 and 1 entries"):
        CostTable.model_validate({**table.model_dump(), "block_reuse": [0.1]})


def test_predict_refuses(table):
    with pytest.raises(ValueError, match=r"kinds\[1\] has 3 blocks; accepted: 4"):
        table.predict([["compute"] * 4, ["compute"] * 3])
    with pytest.raises(ValueError, match=r"kinds\[0\]\[2\] is 'cache'; accepted: compute, reuse, skip"):
        table.predict([["compute", "skip", "cache", "skip"]])


def hooks_of(module: torch.nn.Module) -> dict:
    return {key: (len(value) if hasattr(value, "__len__") else value) for key, value in vars(module).items()}


def test_leaves_nothing_behind_and_changes_no_picture(pipe):
    modules = [pipe.transformer, *pipe.transformer.transformer_blocks]

    def picture():
        torch.manual_seed(1)
        return generate(pipe, steps=2).images

    before, state = picture(), [hooks_of(module) for module in modules]
    seen = []
    measure_cost_table(pipe, lambda: seen.append(picture()) or seen[-1], repeats=1)
    assert [hooks_of(module) for module in modules] == state
    for image in [*seen, picture()]:
        np.testing.assert_array_equal(image, before)


def test_leaves_nothing_behind_after_a_failure(pipe):
    modules = [pipe.transformer, *pipe.transformer.transformer_blocks]
    state = [hooks_of(module) for module in modules]
    calls = iter(range(10))

    def fails_later():
        result = generate(pipe, steps=1)
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return result

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_cost_table(pipe, fails_later, repeats=2)
    assert [hooks_of(module) for module in modules] == state


def test_refuses_runs_that_are_no_measure(pipe):
    steps = iter([1, 1, 2])
    with pytest.raises(ValueError, match=r"ran \[1, 2\] steps in different repeats"):
        measure_cost_table(pipe, lambda: generate(pipe, next(steps)), repeats=2)
    with pytest.raises(ValueError, match=r"blocks \[0, 1, 2, 3\] did not run"):
        measure_cost_table(pipe, lambda: None)
    with pytest.raises(ValueError, match="repeats is 0"):
        measure_cost_table(pipe, lambda: generate(pipe), repeats=0)

    def one_block_left_out():
        kept = pipe.transformer.transformer_blocks
        result = generate(pipe, 1)
        pipe.transformer.transformer_blocks = torch.nn.ModuleList([*kept[:2], *kept[3:]])
        try:
            generate(pipe, 1)
        finally:
            pipe.transformer.transformer_blocks = kept
        return result

    with pytest.raises(ValueError, match="block 2 ran 1 times in 2 steps"):
        measure_cost_table(pipe, one_block_left_out, repeats=1)


class Sleeper(torch.nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return None, x


class Sleepers(torch.nn.Module):
    def __init__(self, *seconds: float):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(map(Sleeper, seconds))

    def forward(self, x):
        time.sleep(0.004)
        for block in self.transformer_blocks:
            x = block(x)[1]
        return x


@pytest.fixture(autouse=True)
def known(monkeypatch):
    row = Architecture("Sleepers", (Blocks("transformer_blocks", "text, image"),), guidance="batched")
    monkeypatch.setitem(ARCHITECTURES, "Sleepers", row)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by sleeping alone, however busy the machine is."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def test_times_land_where_they_were_spent(clock):
    model = Sleepers(0.01, 0.03)

    def call():
        time.sleep(0.02)
        for _ in range(3):
            model(torch.ones(1, 4, 8))
        return SimpleNamespace(images=np.zeros((1, 16, 16, 3)))

    table = measure_cost_table(SimpleNamespace(transformer=model), call, repeats=3)
    assert table.block_compute == pytest.approx([0.01, 0.03])
    assert table.step_overhead == pytest.approx(0.004)
    assert table.step_outside == pytest.approx(0)
    assert table.run_overhead == pytest.approx(0.02)
    assert table.run_seconds == pytest.approx(0.02 + 3 * 0.044)
    assert table.rows == 1


@pytest.mark.parametrize("part", ["block", "transformer"])
def test_refuses_a_compiled_transformer(part):
    model = Sleepers(0.0, 0.0)
    (model.transformer_blocks[1] if part == "block" else model).compile()
    with pytest.raises(ValueError, match="compiled"):
        measure_cost_table(SimpleNamespace(transformer=model), lambda: None)
    with pytest.raises(ValueError, match="compiled"):
        measure_cost_table(SimpleNamespace(transformer=torch.compile(Sleepers(0.0))), lambda: None)


def test_time_runs(clock):
    calls = []

    def run():
        calls.append(time.sleep([0.08, 0.01, 0.08, 0.01, 0.01, 0.01][len(calls) % 6]))

    assert time_runs(run, repeats=5, warmup=1) == pytest.approx(0.01)  # the median, without the warm-up
    assert len(calls) == 6
    with pytest.raises(ValueError, match="repeats is 0"):
        time_runs(run, repeats=0)


@given(st.floats(0.1, 10), st.lists(st.floats(0.5, 20), min_size=1, max_size=9))
def test_a_speedup_does_not_depend_on_how_slow_the_machine_is_in_a_turn(ratio, slowness):
    after = [0.1 * slow for slow in slowness]
    assert speedup([ratio * seconds for seconds in after], after) == pytest.approx(ratio)


def test_a_turn_amid_which_the_machine_slows_does_not_decide_a_speedup():
    assert speedup([1.0, 1.0, 3.0], [0.5, 1.5, 1.5]) == pytest.approx(2)  # the medians alone say 1.0 to 1.5
    with pytest.raises(ValueError, match="zip"):
        speedup([1.0, 2.0], [1.0])


def sleeping(steps: int = 3) -> tuple[SimpleNamespace, Callable[[], SimpleNamespace]]:
    """A pipeline of steps of 44 ms in the transformer and 5 outside, and 20 before them."""
    model = Sleepers(0.01, 0.03)

    def call():
        time.sleep(0.02)
        for _ in range(steps):
            model(torch.ones(1, 4, 8))
            time.sleep(0.005)
        return SimpleNamespace(images=np.zeros((1, 16, 16, 3)))

    return SimpleNamespace(transformer=model), call


def test_the_transformer_alone_is_timed(clock):
    pipe, call = sleeping()
    state = hooks_of(pipe.transformer)
    timed = time_pipeline(pipe, call, repeats=3, warmup=2)
    assert timed.transformer == pytest.approx(3 * 0.044)
    assert timed.pipeline == pytest.approx(0.02 + 3 * 0.049)
    assert hooks_of(pipe.transformer) == state
    with pytest.raises(ValueError, match="repeats is 0"):
        time_pipeline(pipe, call, repeats=0)
    with pytest.raises(ZeroDivisionError):
        time_pipeline(pipe, lambda: 1 / 0)
    assert hooks_of(pipe.transformer) == state


def test_the_transformer_alone_is_predicted(clock):
    """Of a run whose last pause lies after the loop, where nothing tells it from the decoder."""
    pipe, call = sleeping()
    table = measure_cost_table(pipe, call, repeats=3)
    assert table.step_overhead == pytest.approx(0.004 + 2 * 0.005 / 3)
    assert table.step_outside == pytest.approx(2 * 0.005 / 3)
    model = {"transformer": "Sleepers", "num_blocks": 2, "fingerprint": "0" * 64}
    skip = {"blocks": [1], "window": [0.5, 1.0], "action": {"type": "skip"}}
    for rules, saved in (([], 0.0), ([skip], 2 * 0.03)):
        policy = BlockPolicy.model_validate({"name": "p", "model": model, "rules": rules})
        assert table.predict_transformer(policy, 4) == pytest.approx(4 * 0.044 - saved)
        assert table.predict_policy(policy, 4) == pytest.approx(
            table.predict_transformer(policy, 4) + table.run_overhead + 4 * table.step_outside
        )
    before = {key: value for key, value in table.model_dump().items() if key != "step_outside"}
    assert CostTable.model_validate(before).step_outside == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(pipe):
    pipe.to("cuda")
    try:
        table = measure_cost_table(pipe, lambda: generate(pipe), repeats=3)
        timed = time_pipeline(pipe, lambda: generate(pipe), repeats=3)
        began = time.perf_counter()
        seconds = time_runs(lambda: generate(pipe), repeats=3)
        passed = time.perf_counter() - began
        # a product that the host does not wait for is timed to its end: the second is 64 times the first
        sides = [torch.ones(n, n, device="cuda") for n in (2048, 8192)]
        small, large = (time_runs(lambda x=x: [x @ x for _ in range(4)]) for x in sides)
    finally:
        pipe.to("cpu")
    assert 0 < timed.transformer < timed.pipeline
    assert timed.pipeline == pytest.approx(seconds, rel=0.5)
    assert 3 * seconds < passed
    assert large > 8 * small
    policy = BlockPolicy.for_model(pipe, "plain", [])
    assert table.predict_transformer(policy, STEPS) == pytest.approx(timed.transformer, rel=0.5)
    assert table.device == torch.cuda.get_device_name()
    assert table.predict(kinds("compute")) == pytest.approx(table.run_seconds, rel=1e-9)
    assert all(c > 0 for c in table.block_compute)


def test_guidance_by_a_call_for_each_half_costs_both(monkeypatch):
    """Blocks of 0.1 s; a rule for one branch saves in that branch's calls alone."""
    row = Architecture("Sleepers", (Blocks("transformer_blocks", "text, image"),), guidance="calls")
    monkeypatch.setitem(ARCHITECTURES, "Sleepers", row)
    model = {"transformer": "Sleepers", "num_blocks": 2, "fingerprint": "0" * 64}
    rule = {"blocks": [1], "branch": "uncond", "action": {"type": "skip"}}
    policy = BlockPolicy.model_validate({"name": "p", "model": model, "rules": [rule]})
    table = CostTable(
        block_compute=(0.1, 0.1), block_reuse=(0.0, 0.0), step_overhead=0.01, run_overhead=1.0, run_seconds=2.0,
        steps=8, repeats=1, batch=1, rows=1, height=8, width=8, device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    guided = table.model_copy(update={"calls_per_step": 2})
    assert guided.predict_policy(policy, 4) == pytest.approx(1.0 + 8 * 0.01 + 4 * 0.2 + 4 * 0.1)
    assert table.predict_policy(policy, 4) == pytest.approx(1.0 + 4 * 0.01 + 4 * 0.2)


def test_scaled_text_is_paid_where_its_block_computes():
    model = {"transformer": "SD3Transformer2DModel", "num_blocks": 2, "fingerprint": "0" * 64}
    louder = {"type": "scale_text", "operand": "value", "scale": 1.5}
    rules = [
        {"blocks": [0, 1], "window": [0.0, 0.5], "action": louder},
        {"blocks": [1], "window": [0.25, 1.0], "action": {"type": "reuse"}},
        {"blocks": [0], "window": [0.5, 1.0], "action": {"type": "scale_text", "operand": "input", "scale": 1.5}},
    ]
    policy = BlockPolicy.model_validate({"name": "p", "model": model, "rules": rules})
    table = CostTable(
        block_compute=(0.1, 0.1), block_reuse=(0.0, 0.0), block_scaled={"value": (0.01, 0.02)}, step_overhead=0.0,
        run_overhead=1.0, run_seconds=1.8, steps=4, repeats=1, batch=1, rows=1, height=8, width=8, device="cpu",
        dtype="float32", threads=1,
    )  # fmt: skip
    # block 0 computes four times, two of them louder, block 1 once, louder; what reuses does not attend
    assert table.predict_policy(policy, 4) == pytest.approx(1.0 + 5 * 0.1 + 2 * 0.01 + 0.02)
    with pytest.raises(ValidationError, match=r"block_scaled.value has 1 entries; accepted: 2, one per block"):
        CostTable.model_validate({**table.model_dump(), "block_scaled": {"value": (0.1,)}})


def test_a_forecast_is_paid_as_an_addition_more():
    """Of two neighbours that reuse as one, once."""
    rules = [{"blocks": [0, 1], "window": [0.5, 1.0], "action": {"type": "reuse", "forecast": "linear"}}]
    model = {"transformer": "SD3Transformer2DModel", "num_blocks": 2, "fingerprint": "0" * 64}
    table = CostTable(
        block_compute=(0.1, 0.1), block_reuse=(0.01, 0.02), step_overhead=0.0, run_overhead=1.0, run_seconds=1.8,
        steps=4, repeats=1, batch=1, rows=1, height=8, width=8, device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    policy = BlockPolicy.model_validate({"name": "p", "model": model, "rules": rules})
    assert table.predict_policy(policy, 4) == pytest.approx(1.0 + 4 * 0.1 + 2 * 2 * 0.01)


def test_the_cost_of_scaled_text_is_measured_in_every_block(pipe, clock, monkeypatch):
    """An attention takes 10 ms, and 30 more where its text is scaled."""
    attend = ScaledAttention.attend
    monkeypatch.setattr(ScaledAttention, "attend", lambda *a, **k: (time.sleep(0.03), attend(*a, **k))[1])
    with ExitStack() as hooks:
        for block in pipe.transformer.transformer_blocks:
            hooks.enter_context(block.attn.register_forward_hook(lambda *_: time.sleep(0.01)))
        table = measure_cost_table(pipe, lambda: generate(pipe), repeats=3, operands=("input", "value"))
    assert list(table.block_scaled) == ["value"]
    assert len(table.block_scaled["value"]) == BLOCKS
    assert sum(table.block_scaled["value"]) > 0
    assert table.block_compute == pytest.approx([0.01] * BLOCKS)
    assert table.block_scaled["value"] == pytest.approx([0.03] * BLOCKS)
    assert not any(hasattr(block, "stands_in_for") for block in pipe.transformer.transformer_blocks)


def test_what_scaled_text_costs_does_not_hang_on_when_the_machine_slows(pipe, clock, monkeypatch):
    """It takes three times as long from the fourth run on, after the untimed one, one as it is, and one scaled."""
    attend, runs = ScaledAttention.attend, []
    slow = lambda: 3 if len(runs) > 3 else 1  # noqa: E731
    monkeypatch.setattr(ScaledAttention, "attend", lambda *a, **k: (time.sleep(0.03 * slow()), attend(*a, **k))[1])
    with ExitStack() as hooks:
        for block in pipe.transformer.transformer_blocks:
            hooks.enter_context(block.attn.register_forward_hook(lambda *_: time.sleep(0.01 * slow())))
        call = lambda: (runs.append(1), generate(pipe))[1]  # noqa: E731
        table = measure_cost_table(pipe, call, repeats=2, operands=("value", "logit", "key"))
    assert list(table.block_scaled) == ["value", "key", "logit"]
    assert table.block_scaled["value"] == pytest.approx([0.03] * BLOCKS)
    assert table.block_scaled["logit"] == pytest.approx([0.09] * BLOCKS)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_calls_per_step_are_counted(guidance):
    pipe = qwen_image_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def call():
        return pipe(
            "a cat", negative_prompt="a", true_cfg_scale=guidance, num_inference_steps=3, height=16, width=16,
            max_sequence_length=16, output_type="np",
        )  # fmt: skip

    table = measure_cost_table(pipe, call, repeats=1)
    assert table.calls_per_step == (2 if guidance > 1 else 1)
    assert table.steps == 3 * table.calls_per_step
    plain = BlockPolicy.for_model(pipe, "plain", [])
    assert table.predict_policy(plain, 3) == pytest.approx(table.run_seconds, rel=1e-6)


def test_steps_without_guidance_cost_a_share(pipe):
    table = measure_cost_table(pipe, lambda: generate(pipe), repeats=2, unguided=True)
    assert table.guided
    assert 0 < table.unguided <= 1
    assert measure_cost_table(pipe, lambda: generate(pipe, guidance=1.0), repeats=1, unguided=True).unguided == 1.0
    table = table.model_copy(update={"unguided": 0.6, "block_scaled": {"value": (0.5,) * BLOCKS}})
    reuse = Rule(blocks=range(BLOCKS), window=(0.4, 1.0), action=Reuse())  # of steps 2 to 4
    louder = Rule(blocks=[1], window=(0.8, 1.0), action=ScaleText(operand="value", scale=2))

    def predicted(*rules: Rule, window: tuple[float, float]) -> float:
        return table.predict_policy(BlockPolicy.for_model(pipe, "x", rules, guidance_window=window), STEPS)

    step = table.step_overhead + sum(table.block_compute)
    assert predicted(window=(0, 0.4)) == pytest.approx(table.run_overhead + (2 + 3 * 0.6) * step)
    assert predicted(window=(0.2, 1)) == pytest.approx(table.run_overhead + 4.6 * step)
    assert predicted(louder, window=(0, 0.4)) == pytest.approx(predicted(window=(0, 0.4)) + 0.6 * 0.5)
    reused = table.step_overhead + table.block_reuse[0]
    assert predicted(reuse, window=(0, 0.6)) == pytest.approx(table.run_overhead + 2 * step + 2.2 * reused)


def test_steps_without_guidance_leave_a_call_out_where_guidance_makes_two():
    pipe = qwen_image_pipeline()
    guided = {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 3.0, "num_inference_steps": 4}
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16, "output_type": "np"}
    table = measure_cost_table(pipe, lambda: pipe(**guided, **sizes), repeats=1, unguided=True)
    assert table.guided
    assert table.unguided == 1.0
    blocks = sum(table.block_compute)
    predicted = table.predict_policy(BlockPolicy.for_model(pipe, "x", [], guidance_window=(0, 0.5)), 4)
    assert predicted == pytest.approx(table.run_overhead + 8 * table.step_overhead + 6 * blocks)
