"""What every family owes: skip, reuse, windows, the report, and that nothing is left behind.

Each action is checked against the unmodified model, changed by hand (`by_hand.py`).
"""

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from .by_hand import forward_as, identity, keeping_residuals
from .families import BLOCKS, FAMILIES, STEPS, Family, stacked

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name, scope="module")


def policy_for(model: nn.Module, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(model, "test", rules)


def under(model: nn.Module, family: Family, *rules: Rule) -> torch.Tensor:
    with apply_policy(model, policy_for(model, *rules)):
        return family.forward(model)


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, hook dicts and child dicts by content."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


def names_of(model: nn.Module) -> list[list[str]]:
    """Of what a checkpoint holds, and of its parameters, in order."""
    return [list(model.state_dict()), [name for name, _ in model.named_parameters()]]


# --- nothing to do -----------------------------------------------------------------------------------------------


@by_family
def test_blocks_are_those_of_the_table(family, model):
    assert policy_for(model).model.num_blocks == len(family.slots)
    assert policy_for(model).model.transformer == type(model).__name__


@by_family
def test_no_rules_is_bit_identical_and_leaves_nothing(family, model):
    expected, before, keys = family.forward(model), snapshot(model), list(model.state_dict())
    with apply_policy(model, policy_for(model)) as applied:
        assert torch.equal(family.forward(model), expected)
        assert list(model.state_dict()) == keys
    assert applied.report.table == (("compute",) * len(family.slots),)
    assert snapshot(model) == before


# --- skip --------------------------------------------------------------------------------------------------------


@by_family
def test_skip_is_removal(family, model):
    """Where a block is modulated by its index, removal would give it to the next; there an identity takes its place."""
    expected = family.forward(model)
    for index, (container, place) in enumerate(family.slots):
        skipped = under(model, family, Rule(blocks=[index], action=Skip()))
        assert not torch.allclose(skipped, expected, atol=1e-2)
        if family.index_matters:
            block = family.block(model, index)
            with forward_as(block, identity(block, container)):
                assert torch.equal(skipped, family.forward(model))
        else:
            removed = family.build()
            del getattr(removed, container.name)[place]
            assert torch.equal(skipped, family.forward(removed))
    assert torch.equal(family.forward(model), expected)


@by_family
def test_all_blocks_can_be_skipped(family, model):
    skipped = under(model, family, Rule(blocks=range(len(family.slots)), action=Skip()))
    with ExitStack() as stack:
        for index, (container, _) in enumerate(family.slots):
            block = family.block(model, index)
            stack.enter_context(forward_as(block, identity(block, container)))
        assert torch.equal(skipped, family.forward(model))


# --- reuse -------------------------------------------------------------------------------------------------------


def reused_by_hand(model: nn.Module, family: Family, blocks: list[int], kinds: str) -> list[torch.Tensor]:
    """A run in which `blocks` do at each step what its letter says: compute, reuse, forecast."""
    spelled = [{"c": "compute", "r": "reuse", "f": "forecast"}[letter] for letter in kinds]
    with ExitStack() as stack:
        for index in blocks:
            block = family.block(model, index)
            stack.enter_context(forward_as(block, keeping_residuals(block, family.slots[index][0], spelled)))
        return family.denoise(model, new_scheduler())


@by_family
@pytest.mark.parametrize(
    ("window", "every", "kinds"),
    [((0, 1), None, "crrr"), ((0, 1), 2, "crcr"), ((0.5, 1), None, "ccrr"), ((0.25, 0.75), 2, "crcc")],
)
@pytest.mark.parametrize("chosen", ["all", "middle", "ends"])
def test_reuse_adds_the_last_residual(family, model, window, every, kinds, chosen):
    count = len(family.slots)
    blocks = {"all": list(range(count)), "middle": [*range(1, count, BLOCKS)], "ends": [0, count - 1]}[chosen]
    scheduler = new_scheduler()
    policy = policy_for(model, Rule(blocks=blocks, window=window, action=Reuse(every=every)))
    with apply_policy(model, policy, scheduler=scheduler) as applied:
        got = family.denoise(model, scheduler)
        report = applied.report
        again = family.denoise(model, scheduler)
    assert all(map(torch.equal, got, again))  # nothing of the first run is left in the second
    torch.testing.assert_close(got, reused_by_hand(model, family, blocks, kinds))
    for step, output in enumerate(family.denoise(model, scheduler)):
        assert torch.allclose(got[step], output, atol=1e-2) == (kinds[step] == "c")
    assert report.reused == kinds.count("r") * len(blocks)
    assert report.computed == STEPS * count - report.reused


@by_family
@pytest.mark.parametrize(
    ("window", "every", "kinds"),
    [((0.5, 1), None, "ccff"), ((0, 1), 2, "crcf"), ((0.25, 1), 2, "crcf")],  # until there are two, the one serves
)
@pytest.mark.parametrize("chosen", ["all", "ends"])
def test_a_forecast_is_the_line_through_the_last_two_residuals(family, model, window, every, kinds, chosen):
    count = len(family.slots)
    blocks = {"all": list(range(count)), "ends": [0, count - 1]}[chosen]
    scheduler = new_scheduler()
    rule = Rule(blocks=blocks, window=window, action=Reuse(every=every, forecast="linear"))
    with apply_policy(model, policy_for(model, rule), scheduler=scheduler) as applied:
        got = family.denoise(model, scheduler)
        report = applied.report
        again = family.denoise(model, scheduler)
    assert all(map(torch.equal, got, again))
    torch.testing.assert_close(got, reused_by_hand(model, family, blocks, kinds), rtol=1e-4, atol=1e-4)
    without = reused_by_hand(model, family, blocks, kinds.replace("f", "r"))
    assert not torch.allclose(got[-1], without[-1], atol=1e-3)
    assert report.reused == (kinds.count("r") + kinds.count("f")) * len(blocks)


@by_family
def test_no_residual_outlives_its_run(family, model):
    """After a failed run, and runs of another batch and another resolution."""
    blocks, scheduler = [*range(len(family.slots))], new_scheduler()
    expected = reused_by_hand(model, family, blocks, "crcr")
    failing, calls = family.block(model, 1), []

    def fail(*_):
        calls.append("")
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    with apply_policy(model, policy_for(model, Rule(blocks=blocks, action=Reuse(every=2))), scheduler=scheduler):
        for other in ({"batch": 1}, {"size": 6}):
            family.denoise(model, scheduler, **other)
            torch.testing.assert_close(family.denoise(model, scheduler), expected)
        with failing.register_forward_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
            family.denoise(model, scheduler)
        torch.testing.assert_close(family.denoise(model, scheduler), expected)


# --- windows and the report --------------------------------------------------------------------------------------


@by_family
def test_report_is_what_ran(family, model):
    last = len(family.slots) - 1
    rules = [
        Rule(blocks=[0], action=Reuse(every=2)),
        Rule(blocks=[1], window=(0.5, 1), action=Skip()),
        Rule(blocks=[last], window=(0, 0.25), action=Skip()),
    ]
    table = [["compute"] * (last + 1) for _ in range(STEPS)]
    table[1][0] = table[3][0] = "reuse"
    table[2][1] = table[3][1] = table[0][last] = "skip"
    if family.hears("value"):
        rules.append(Rule(blocks=[2], window=(0.25, 0.75), action=ScaleText(operand="value", scale=1.5)))
        table[1][2] = table[2][2] = "compute+scale"
    ran = [[] for _ in range(STEPS)]
    scheduler = new_scheduler()

    def watch(index: int) -> Any:
        block = family.block(model, index)
        return block.register_forward_hook(lambda *_: ran[scheduler.step_index or 0].append(index))

    with ExitStack() as stack, apply_policy(model, policy_for(model, *rules), scheduler=scheduler) as applied:
        for index in range(last + 1):
            stack.enter_context(watch(index))
        assert applied.report.calls == ()
        family.denoise(model, scheduler)
    report = applied.report
    assert report.table == tuple(map(tuple, table))
    assert ran == [[i for i, entry in enumerate(row) if entry.startswith("compute")] for row in table]
    entries = [entry for row in table for entry in row]
    assert (report.computed, report.skipped, report.reused, report.scaled) == (
        sum(entry.startswith("compute") for entry in entries),
        entries.count("skip"),
        entries.count("reuse"),
        entries.count("compute+scale"),
    )


# --- what is left behind -----------------------------------------------------------------------------------------


def busy(family: Family) -> list[Rule]:
    """Rules of every kind that the family can obey."""
    last = len(family.slots) - 1
    rules = [Rule(blocks=[0], window=(0.3, 1), action=Skip()), Rule(blocks=[1, last], action=Reuse(every=2))]
    if family.hears("value"):
        rules.append(Rule(blocks=[1, last], action=ScaleText(operand="value", scale=1.5)))
        rules.append(Rule(blocks=[0], window=(0, 0.3), action=ScaleText(operand="key", scale=0.5)))
        rules.append(Rule(blocks=[1], action=ScaleText(operand="input", scale=1.5, scope="local")))
    if family.hears("logit"):
        rules.append(Rule(blocks=[last], action=ScaleText(operand="logit", scale=2)))
    return rules


@by_family
def test_leaving_restores_to_the_bit_and_leaves_nothing(family, model):
    scheduler = new_scheduler()
    expected, before, names = family.denoise(model, scheduler), snapshot(model), names_of(model)
    with apply_policy(model, policy_for(model, *busy(family)), scheduler=scheduler):
        assert not torch.equal(family.denoise(model, scheduler)[1], expected[1])
        assert names_of(model) == names
    assert snapshot(model) == before
    assert all(map(torch.equal, family.denoise(model, scheduler), expected))


@by_family
def test_names_are_the_models_own_amid_a_forward(family, model):
    """In each layer of each block, with blocks skipped and reused and every operand scaled around it."""
    scheduler, names, met = new_scheduler(), names_of(model), []

    def look(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Linear):
            met.append(names_of(model))

    with (
        apply_policy(model, policy_for(model, *busy(family)), scheduler=scheduler) as applied,
        nn.modules.module.register_module_forward_hook(look),
    ):
        family.denoise(model, scheduler)
    assert applied.report.skipped
    assert applied.report.reused
    assert len(met) > applied.report.computed
    assert all(found == names for found in met)


@by_family
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_after_an_exception_inside_a_block(family, model, error):
    scheduler = new_scheduler()
    expected, before = family.denoise(model, scheduler), snapshot(model)

    def fail(*_):
        raise error("inside")

    with (
        apply_policy(model, policy_for(model, *busy(family)), scheduler=scheduler),
        family.block(model, 2).register_forward_hook(fail),
        pytest.raises(error, match="inside"),
    ):
        family.denoise(model, scheduler)
    assert snapshot(model) == before
    assert all(map(torch.equal, family.denoise(model, scheduler), expected))


# --- one policy, one forward at a time ---------------------------------------------------------------------------


@by_family
def test_a_second_policy_is_refused_until_the_first_is_gone(family, model):
    with apply_policy(model, policy_for(model)), pytest.raises(PolicyError, match="already applied"):
        apply_policy(model, policy_for(model))
    with apply_policy(model, policy_for(model)):
        pass


@by_family
def test_two_transformers_keep_their_policies_apart(family, model):
    other = family.build(seed=1)
    skip, reuse = Rule(blocks=[1], action=Skip()), Rule(blocks=[1], action=Reuse(every=2))
    one, two = new_scheduler(), new_scheduler()
    alone = under(model, family, skip)
    reused = reused_by_hand(other, family, [1], "crcr")
    with (
        apply_policy(model, policy_for(model, skip), scheduler=one) as skipping,
        apply_policy(other, policy_for(other, reuse), scheduler=two) as reusing,
    ):
        torch.testing.assert_close(family.denoise(other, two), reused)
        one.set_timesteps(1)
        assert torch.equal(family.forward(model), alone)
    assert (skipping.report.skipped, skipping.report.reused) == (1, 0)
    assert (reusing.report.skipped, reusing.report.reused) == (0, 2)


@by_family
def test_concurrent_forwards_are_refused_not_corrupted(family, model):
    inside, go_on, results = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        assert go_on.wait(10)

    rule = Rule(blocks=[1], action=Skip())
    alone = under(model, family, rule)
    with apply_policy(model, policy_for(model, rule)):
        with family.block(model, 0).register_forward_hook(hold):
            thread = threading.Thread(target=lambda: results.append(family.forward(model)))
            thread.start()
            assert inside.wait(10)
            try:
                with pytest.raises(PolicyError, match="thread"):
                    family.forward(model)
            finally:
                go_on.set()
                thread.join()
        assert torch.equal(results[0], alone)
        assert torch.equal(family.forward(model), alone)


def test_a_cache_that_blocks_fill_is_refused():
    """FLUX.2 keeps keys of reference pictures in its blocks, where one that is left out would leave none."""
    family = next(family for family in FAMILIES if family.name == "flux2")
    model = family.build()
    inputs = family.inputs() | {"kv_cache_mode": "extract", "num_ref_tokens": 2}
    with (
        torch.no_grad(),
        apply_policy(model, policy_for(model, Rule(blocks=[1], action=Skip()))),
        pytest.raises(PolicyError, match="cache"),
    ):
        model(**inputs)


# --- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.not_checkpointed is not None], ids=lambda family: family.name, scope="module"
)
def test_gradient_checkpointing_changes_nothing(family):
    """Under it blocks are called by position, and once more in the backward pass, when no policy is at work."""
    model = family.build()
    inputs = {name: value for name, value in family.inputs().items() if name not in family.not_checkpointed}
    rules = [Rule(blocks=[1], action=Skip())]
    if family.hears("value"):
        last = len(family.slots) - 1
        rules.append(Rule(blocks=[0, last], action=ScaleText(operand="value", scale=1.5)))
        rules.append(Rule(blocks=[0], action=ScaleText(operand="input", scale=1.5, scope="local")))

    def output_and_gradients():
        output = stacked(model(**inputs))
        return output, torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)

    with apply_policy(model, policy_for(model, *rules)):
        expected = output_and_gradients()
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(output_and_gradients(), expected)
