"""What is kept for runs that begin alike: within its memory, for all workers, and without what must be computed."""

from collections.abc import Callable
from typing import Any

import pytest
from blocktune.search.outputs import Outputs
from hypothesis import given
from hypothesis import strategies as st

KIB = 2**-20  # of a GiB
DRIVER = """
import json, sys, time
from pathlib import Path
import numpy as np
import ray
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.search.candidate import Candidate
from blocktune.search.config import load_config
from blocktune.search.pool import Job, Pool

config = load_config(Path(sys.argv[1]), ["ray.workers=2", "ray.cpus_per_worker=1"])
pool = Pool(config)
plain = BlockPolicy(name="unmodified", model=pool.description.model, rules=())
late = plain.model_copy(update={"rules": (Rule(blocks=[1], window=(0.5, 1.0), action=Skip()),)})

def both(policy):
    # two jobs at a time go to two workers
    jobs = [Job("measure", (Candidate(policy, 4), "search", None)) for _ in range(2)]
    pool.run(jobs)
    assert {job.worker for job in jobs} == {0, 1}
    first, second = (job.result for job in jobs)
    assert np.array_equal(first.images, second.images)
    return [first.steps_saved, second.steps_saved]

pool.run([Job("measure", (Candidate(plain, 4), "search", None))])
told = {"known": both(plain), "later": both(late), "all": both(late)}
ray.kill(pool._outputs, no_restart=False)
told["lost"] = both(late)
end = time.monotonic() + 300
while sum(again := both(late)) < 2 and time.monotonic() < end:  # until another has begun in its place
    pass
told["anew"] = again
pool.close()
print(json.dumps(told))
"""


def test_workers_share_what_any_of_them_made(new_world: Callable[..., Any]) -> None:
    """And go on alone where the process that keeps it dies, until another stands in its place."""
    told = new_world().drive(DRIVER)
    assert told["known"] == [1, 1]
    assert min(told["later"]) == 0.5  # the second may have met what the first had made meanwhile
    assert told["all"] == [1, 1]
    assert min(told["lost"]) == 0
    assert told["anew"] == [1, 1]


@pytest.mark.parametrize(
    ("needs", "given"),
    [
        ([[], [], [], []], b"abd"),
        ([[], [], [1], [1]], b"ad"),  # c is not there, and reuses what b made
        ([[], [0], [1], [1]], b"d"),  # and b what a made
        ([[], [0], [0], [2]], b"bd"),  # b is there, so what it would reuse is of no interest
        ([[], [0], [1], [0, 2]], b"d"),
    ],
)
def test_what_is_needed_by_a_step_that_is_not_there_is_computed_again(needs: list[list[int]], given: bytes) -> None:
    outputs = Outputs(1.0)
    there = {b"a": b"1", b"b": b"2", b"d": b"4"}
    outputs.keep(there, {b"a"}, "search")
    assert outputs.recall([b"a", b"b", b"c", b"d"], needs) == {key: there[key] for key in map(bytes, zip(given))}
    assert outputs.recall([], []) == {}


def test_the_unmodified_models_stay_until_the_next_stage() -> None:
    outputs = Outputs(4 * KIB)
    half = bytes(2 * 2**10)
    outputs.keep({b"plain": half, b"own": half}, {b"plain"}, "search")
    outputs.keep({b"newer": half}, set(), "search")
    assert outputs.recall([b"plain", b"own", b"newer"], [()] * 3).keys() == {b"plain", b"newer"}
    outputs.keep({b"next": half, b"last": half}, {b"next"}, "confirm")
    assert outputs.recall([b"plain", b"newer", b"next", b"last"], [()] * 4).keys() == {b"next", b"last"}


keys = st.sampled_from([bytes([i]) for i in range(8)])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.dictionaries(keys, st.integers(0, 3000), max_size=4), st.sets(keys), st.sampled_from("ab")),
            st.lists(keys, max_size=3),
        ),
        max_size=30,
    )
)
def test_no_more_is_held_than_there_is_room_for(calls: list[Any]) -> None:
    outputs, kept = Outputs(4 * KIB), {}
    for call in calls:
        if isinstance(call, list):
            for key, value in outputs.recall(call, [range(at) for at in range(len(call))]).items():
                assert value == kept[key]
        else:
            sizes, plain, stage = call
            values = {key: bytes([key[0]]) * size for key, size in sizes.items()}
            outputs.keep(values, plain, stage)
            held = outputs.plain | outputs.own
            kept |= {key: value for key, value in values.items() if held.get(key) == value}
            assert not outputs.plain.keys() & outputs.own.keys()
            assert sum(map(len, held.values())) == outputs.size - outputs.room <= outputs.size
