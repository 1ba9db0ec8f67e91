"""Pictures go to the blocks of which it is least settled whether they are among the best."""

import numpy as np
import pytest
from blocktune.search.allocation import coarse_to_fine, least_settled
from hypothesis import given
from hypothesis import strategies as st

values = st.lists(st.floats(-1, 1), min_size=1, max_size=8).map(np.array)
tables = st.dictionaries(st.sampled_from("abc"), st.lists(values, min_size=1, max_size=6), min_size=1)


@given(tables, st.integers(1, 4), st.integers(8, 10), st.integers(0, 20))
def test_whoever_lacks_pictures_may_get_some_once(gains, best, images, count):
    picked = least_settled(gains, best, images, count)
    lacking = {(case, i) for case, blocks in gains.items() for i, block in enumerate(blocks) if len(block) < images}
    assert len(picked) == len({*picked}) == min(count, len(lacking))
    assert {*picked} <= lacking


def test_a_close_call_goes_first_and_a_noisy_one_before_a_steady_one():
    noise = np.tile([1.0, -1.0], 8)
    close = [0.3 + 0.1 * noise, 0.2 + 0.1 * noise, -0.4 + 0.1 * noise, 0.9 + 0.1 * noise]
    order = least_settled({"a": close}, 2, 96, 4)
    assert {*order[:2]} == {("a", 0), ("a", 1)}
    noisy = [0.3 + 0.1 * noise, 0.3 + noise, 1 + 0.1 * noise, -1 + 0.1 * noise]
    assert least_settled({"a": noisy, "b": close}, 2, 10**6, 8)[0] == ("a", 1)


def test_all_pictures_settle_a_block_and_few_equal_ones_do_not():
    alike = [np.zeros(4), np.tile([0.5, -0.4], 48), np.full(4, -0.02)]
    assert {block for _, block in least_settled({"a": alike}, 1, 96, 3)} == {0, 2}


@pytest.mark.parametrize("seed", range(3))
def test_more_of_the_best_are_found_than_with_as_many_pictures_of_each(seed):
    """Of eight effects at 24 blocks the best three, whose differences are of the size of one block's interval."""
    rng = np.random.default_rng(seed)
    pictures, best, step = 96, 3, 8
    truth = rng.normal(0, 0.05, (8, 24, 1)) + rng.normal(0, 0.15, (8, 24, pictures))
    gains = coarse_to_fine(
        lambda wanted: {(case, block): truth[case, block, :count] for (case, block), count in wanted.items()},
        range(8), 24, pictures, step, 0.4, best,
    )  # fmt: skip

    def found(means):
        wanted = truth.mean(axis=2).argsort(axis=1)[:, -best:]
        return sum(len({*row} & {*told}) for row, told in zip(wanted, means.argsort(axis=1)[:, -best:], strict=True))

    adaptive = found(np.array([[block.mean() for block in blocks] for blocks in gains.values()]))
    uniform = found(truth[:, :, : int(0.4 * pictures)].mean(axis=2))
    assert sum(len(block) for blocks in gains.values() for block in blocks) <= 0.4 * truth.size
    assert adaptive >= max(21, uniform + 3), uniform  # of 24


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 1), st.sets(st.sampled_from("ab")))
def test_every_block_has_the_first_pictures_and_no_more_than_the_share_is_drawn(blocks, images, first, share, refused):
    asked = []

    def draw(wanted):
        asked.append(dict(wanted))
        return {(case, block): np.zeros(n) for (case, block), n in wanted.items() if (case, block) not in without}

    without = {(case, 0) for case in refused}
    gains = coarse_to_fine(draw, "abc", blocks, images, first, share, best=2)
    assert {*gains} == {*"abc"} - refused
    drawn = [len(values) for known in gains.values() for values in known]
    assert all(min(first, images) <= n <= images for n in drawn)
    assert sum(drawn) <= max(share * images, min(first, images)) * len(drawn)
    assert share < 1 or set(drawn) == {images}
    assert not any(case in refused for wanted in asked[1:] for case, _ in wanted)  # not asked for again
