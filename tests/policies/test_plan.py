"""Which block does what at which step."""

import pytest
from blocktune.policies import BlockPolicy, Counts, Plan, PolicyError, Reuse, Rule, ScaleText, Skip
from hypothesis import given
from hypothesis import strategies as st

MODEL = {"transformer": "SD3Transformer2DModel", "num_blocks": 3, "fingerprint": "0" * 64}


def plan_of(*rules: Rule, num_steps: int, start: int = 0) -> Plan:
    return Plan.compile(BlockPolicy.model_validate({"name": "p", "model": MODEL, "rules": rules}), num_steps, start)


def steps_of(plan: Plan, block: int, kind: str) -> list[int]:
    return [i for i, step in enumerate(plan.kinds) if step and step[block] == kind]


@given(
    num_steps=st.integers(1, 60),
    window=st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda w: w[0] < w[1]),
)
def test_a_window_holds_the_steps_of_its_fractions(num_steps, window):
    plan = plan_of(Rule(blocks=[1], window=(window[0] / 100, window[1] / 100), action=Skip()), num_steps=num_steps)
    # In whole numbers, so that no rounding decides: start <= i/T < end.
    inside = [i for i in range(num_steps) if window[0] * num_steps <= 100 * i < window[1] * num_steps]
    assert steps_of(plan, 1, "skip") == inside
    assert steps_of(plan, 0, "compute") == list(range(num_steps))


@pytest.mark.parametrize(
    ("window", "every", "start", "computed"),
    [  # 6 steps
        ((0, 1), 2, 0, [0, 2, 4]),
        ((0, 1), 3, 0, [0, 3]),
        ((0, 1), None, 0, [0]),
        ((0.5, 1), None, 0, [0, 1, 2]),
        ((0.5, 1), 2, 0, [0, 1, 2, 4]),  # every second step of the window: its second, ...
        ((0.5, 1), 3, 0, [0, 1, 2, 5]),  # ... its third
        ((0.3, 0.6), None, 0, [0, 1, 4, 5]),
        ((0, 1), 2, 1, [1, 3, 5]),  # image-to-image, begun at step 1
        ((0, 0.5), None, 2, [2, 3, 4, 5]),
    ],
)
def test_steps_at_which_a_reusing_block_computes(window, every, start, computed):
    plan = plan_of(Rule(blocks=[2], window=window, action=Reuse(every=every)), num_steps=6, start=start)
    assert steps_of(plan, 2, "compute") == computed
    assert steps_of(plan, 2, "reuse") == [i for i in range(start, 6) if i not in computed]
    assert plan.kinds[:start] == [[]] * start


@given(
    num_steps=st.integers(1, 40),
    start=st.integers(0, 39),
    every=st.none() | st.integers(2, 9),
    cuts=st.lists(st.integers(0, 20), min_size=4, max_size=4, unique=True).map(sorted),
)
def test_a_residual_is_there_fresh_enough_and_kept_no_longer_than_needed(num_steps, start, every, cuts):
    start = min(start, num_steps - 1)
    a, b, c, d = (cut / 20 for cut in cuts)
    plan = plan_of(
        Rule(blocks=[0], window=(a, c), action=Reuse(every=every)),
        Rule(blocks=[0], window=(c, d), action=Skip()),
        Rule(blocks=[0], window=(a, b), action=ScaleText(operand="value", scale=2)),
        num_steps=num_steps,
        start=start,
    )
    held: int | None = None  # the step whose residual is in memory
    last: int | None = None  # the last step that computed
    for i in range(start, num_steps):
        step = plan.steps[i][0]
        if step.kind == "reuse":
            assert held is not None
            assert held == last
            assert every is None or i - held < every
            held = None if step.releases else held
        elif step.kind == "compute":
            assert held is None  # released by its last reuse
            last = i
            held = i if step.keeps else held
        assert not (step.keeps and step.kind != "compute")
        assert not (step.releases and step.kind != "reuse")
        assert bool(step.scales) == (a <= i / num_steps < b and step.kind == "compute")
    assert held is None


@given(
    num_steps=st.integers(1, 30),
    start=st.integers(0, 29),
    every=st.none() | st.integers(2, 9),
    cuts=st.lists(st.integers(0, 20), min_size=4, max_size=4, unique=True).map(sorted),
    later=st.sampled_from([None, "linear"]),
)
def test_a_forecast_is_of_the_last_two_computed_and_both_are_there(num_steps, start, every, cuts, later):
    start = min(start, num_steps - 1)
    a, b, c, d = (cut / 20 for cut in cuts)
    plan = plan_of(
        Rule(blocks=[0], window=(a, b), action=Reuse(every=every, forecast="linear")),
        Rule(blocks=[0], window=(b, c), action=Skip()),
        Rule(blocks=[0], window=(c, d), action=Reuse(every=every, forecast=later)),
        num_steps=num_steps,
        start=start,
    )
    held: list[int] = []  # the steps whose residuals are in memory
    computed: list[int] = []
    for i in range(start, num_steps):
        step = plan.steps[i][0]
        if step.kind == "compute":
            computed.append(i)
            if step.keeps:
                held = [*held, i][-2:] if step.forecast else [i]
            else:
                assert not held  # released by its last reuse
        elif step.kind == "reuse":
            forecasts = a <= i / num_steps < b or later == "linear"
            assert step.forecast == (forecasts and len(computed) > 1)
            assert held[-1] == computed[-1]
            if step.forecast:
                assert held == computed[-2:]
            held = [] if step.releases else held
    assert not held


def test_reuse_is_the_same_in_one_window_or_two():
    whole = plan_of(Rule(blocks=[0], window=(0.1, 0.9), action=Reuse(every=3)), num_steps=20)
    parts = plan_of(
        Rule(blocks=[0], window=(0.1, 0.35), action=Reuse(every=3)),
        Rule(blocks=[0], window=(0.35, 0.9), action=Reuse(every=3)),
        num_steps=20,
    )
    assert whole == parts


def test_a_block_that_reuses_has_only_its_running_stream_scaled():
    scales = [
        ScaleText(operand="key", scale=2),
        ScaleText(operand="logit", scale=2),
        ScaleText(operand="input", scale=2),
    ]
    rules = [Rule(blocks=[0], action=action) for action in (*scales, Reuse())]
    plan = plan_of(*rules, num_steps=2)
    assert [a.operand for _, a in plan.steps[0][0].scales] == ["input", "key", "logit"]
    assert [a.operand for _, a in plan.steps[1][0].scales] == ["input"]


def test_rules_that_change_nothing_leave_blocks_untouched():
    plan = plan_of(Rule(blocks=[0, 1, 2], action=ScaleText(operand="key", scale=1.0)), num_steps=4)
    assert not any(block.touched for step in plan.steps for block in step)


def test_counts():
    plan = plan_of(
        Rule(blocks=[0], window=(0.5, 1), action=Skip()),
        Rule(blocks=[1], action=Reuse(every=2)),
        Rule(blocks=[1], action=ScaleText(operand="input", scale=2)),
        Rule(blocks=[2], window=(0, 0.25), action=ScaleText(operand="key", scale=2)),
        num_steps=4,
    )
    assert plan.counts() == Counts(computed=2 + 2 + 4, skipped=2, reused=2, scaled=4 + 1)


ACTIONS = [
    Reuse(), Reuse(every=2), Reuse(every=2, forecast="linear"), Skip(), ScaleText(operand="input", scale=2),
    ScaleText(operand="key", scale=2),
]  # fmt: skip


@st.composite
def rule(draw) -> Rule:
    start, end = sorted(draw(st.sets(st.integers(0, 8), min_size=2, max_size=2)))
    blocks = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
    return Rule(blocks=blocks, window=(start / 8, end / 8), action=draw(st.sampled_from(ACTIONS)))


@given(rules=st.lists(rule(), max_size=5))
def test_a_run_keeps_and_reuses_as_one(rules):
    try:
        plan = plan_of(*rules, num_steps=8)
    except PolicyError:  # rules that contradict each other
        return
    held: dict[int, tuple[int, int]] = {}  # blocks that hold a residual, and with whom
    for step, kinds, work in zip(plan.steps, plan.kinds, plan.work, strict=True):
        for block, told in enumerate(step):
            if told.keeps:
                held[block] = told.run or (block, block)
            if told.kind == "reuse":
                assert (told.run or (block, block)) == held[block]
        for block, (first, last) in held.items():
            assert first <= block <= last
            assert [held.get(b) for b in range(first, last + 1)] == [(first, last)] * (last + 1 - first)
            alike = {(step[b].kind, step[b].keeps, step[b].releases, step[b].forecast) for b in range(first, last + 1)}
            assert len(alike) == 1
            if first < last:
                assert not any(a.operand == "input" for b in range(first, last + 1) for _, a in step[b].scales)
        for block, told in enumerate(step):
            idle = told.kind == "reuse" and held[block][0] != block
            assert work[block] == ("skip" if idle else kinds[block])
            if told.releases:
                del held[block]
    assert not held


def test_neighbours_that_reuse_alike_are_one_run():
    plan = plan_of(Rule(blocks=[0, 1, 2], action=Reuse(every=2)), num_steps=2)
    assert [[b.run for b in step] for step in plan.steps] == [[(0, 2)] * 3] * 2
    assert plan.work == [["compute"] * 3, ["reuse", "skip", "skip"]]
