import pytest
import torch
from blocktune.evaluators.batches import each_in_batches, in_batches, of_equal_size
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50))
def test_rows_keep_their_order_whatever_fits(count, size, fits):
    seen = []

    def double(rows):
        if len(rows) > fits:
            raise torch.OutOfMemoryError("the batch is too large")
        seen.append(len(rows))
        return 2 * torch.tensor(rows)

    assert in_batches(double, list(range(count)), size).tolist() == [2 * i for i in range(count)]
    assert sum(seen) == count
    assert max(seen) <= min(size, fits)


def test_results_of_any_kind_are_one_per_row():
    assert each_in_batches(lambda rows: [row * "a" for row in rows], [1, 2, 3], 2) == ["a", "aa", "aaa"]
    assert each_in_batches(lambda rows: rows, []) == []


def test_a_row_that_does_not_fit_alone_is_an_error():
    def never(rows):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_batches(never, [1, 2, 3])


def test_results_are_float32_without_gradients():
    weight = torch.ones(2, requires_grad=True)
    result = in_batches(lambda rows: (torch.tensor(rows)[:, None] * weight).half(), [1.0, 2.0, 3.0], 2)
    assert (result.dtype, result.requires_grad, result.shape) == (torch.float32, False, (3, 2))


def test_pictures_are_grouped_by_size():
    pictures = [Image.new("RGB", size) for size in ((4, 5), (5, 4), (4, 5), (6, 6))]
    assert of_equal_size(pictures) == [[0, 2], [1], [3]]
