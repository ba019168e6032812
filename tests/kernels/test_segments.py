"""Segments against loops over Python slices, with empty and one-element segments wherever they can stand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_kernels.segments import (
    boundaries,
    ranges,
    segment_ids,
    segment_index,
    segment_lengths,
    segment_mean,
    segment_sum,
)
from torch import Tensor

LENGTHS = [[], [0], [0, 0], [1], [1, 0, 3], [0, 2], [2, 0], [127, 1, 0, 1000]]
some_lengths = st.lists(st.integers(0, 5), max_size=6)


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def pieces(x_T: Tensor, lengths: list[int]) -> list[Tensor]:
    starts = cu(lengths).tolist()
    return [x_T[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def test_fresh_float_memory_is_nan_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.float64)).isnan().all()


def test_lengths_are_the_steps_between_boundaries():
    assert segment_lengths(torch.tensor([0, 2, 2, 3])).tolist() == [2, 0, 1]


def test_one_boundary_bounds_no_segment():
    assert segment_lengths(torch.tensor([0])).tolist() == []


@given(some_lengths)
@settings(deadline=None)
def test_boundaries_undo_lengths(lengths: list[int]):
    cu_seqlens = boundaries(torch.tensor(lengths, dtype=torch.int64))
    assert cu_seqlens.tolist() == cu(lengths).tolist()
    assert segment_lengths(cu_seqlens).tolist() == lengths


@pytest.mark.parametrize("wrong", [[1, 2], [0, 3, 2], [-1, 0], [[0, 1]]])
def test_boundaries_that_do_not_start_at_0_or_decrease_are_refused_and_shown(wrong: list):
    with pytest.raises(ValueError, match="starts at 0 and never decreases") as error:
        segment_lengths(torch.tensor(wrong))
    assert str(wrong) in str(error.value)


def test_no_boundaries_at_all_are_refused():
    with pytest.raises(ValueError, match="got \\[\\]"):
        segment_lengths(torch.tensor([], dtype=torch.int64))


def test_ids_skip_an_empty_segment():
    assert segment_ids(torch.tensor([0, 2, 2, 3])).tolist() == [0, 0, 2]


@given(some_lengths)
@settings(deadline=None)
def test_ids_count_each_segment_as_often_as_it_is_long(lengths: list[int]):
    ids = segment_ids(cu(lengths)).tolist()
    assert ids == sorted(ids)
    assert [ids.count(segment) for segment in range(len(lengths))] == lengths


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sum_matches_a_loop_over_slices(lengths: list[int]):
    x_T = torch.randn(sum(lengths), dtype=torch.float64)
    want = [float(piece.sum()) for piece in pieces(x_T, lengths)]
    assert segment_sum(x_T, cu(lengths)).tolist() == pytest.approx(want)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_mean_matches_a_loop_over_slices_and_is_0_where_there_is_nothing(lengths: list[int]):
    x_T = torch.randn(sum(lengths), dtype=torch.float64)
    want = [float(piece.mean()) if len(piece) else 0.0 for piece in pieces(x_T, lengths)]
    assert segment_mean(x_T, cu(lengths)).tolist() == pytest.approx(want)


def test_gradient_of_the_sum_reaches_every_element_of_its_segment():
    x_T = torch.randn(4, requires_grad=True)
    (segment_sum(x_T, torch.tensor([0, 1, 1, 4, 4])) * torch.tensor([2.0, 100.0, 3.0, 100.0])).sum().backward()
    assert x_T.grad is not None
    assert x_T.grad.tolist() == [2.0, 3.0, 3.0, 3.0]


def test_gradient_of_the_mean_is_shared_by_its_segment():
    x_T = torch.randn(5, requires_grad=True)
    (segment_mean(x_T, torch.tensor([0, 1, 1, 5, 5])) * torch.tensor([2.0, 100.0, 3.0, 100.0])).sum().backward()
    assert x_T.grad is not None
    assert x_T.grad.tolist() == [2.0, 0.75, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("reduce", [segment_sum, segment_mean])
def test_gradients_match_finite_differences(reduce):
    x_T = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reduce(x, torch.tensor([0, 0, 1, 1, 6, 6])), (x_T,))


def test_sum_gives_the_same_bits_every_time():
    x_T, cu_seqlens = torch.randn(5000), torch.tensor([0, 1, 4000, 4000, 5000])
    assert torch.equal(segment_sum(x_T, cu_seqlens), segment_sum(x_T.clone(), cu_seqlens))


def test_ranges_run_one_after_another():
    assert ranges(torch.tensor([5, 0]), torch.tensor([2, 1])).tolist() == [5, 6, 0]


def test_empty_ranges_leave_no_trace():
    assert ranges(torch.tensor([3, 9, 1]), torch.tensor([0, 2, 0])).tolist() == [9, 10]


def test_index_follows_the_order_of_the_rows():
    assert segment_index(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 0])).tolist() == [2, 3, 4, 0, 1]


def test_index_of_no_rows_is_empty():
    assert segment_index(torch.tensor([0, 2, 5]), torch.tensor([], dtype=torch.int64)).tolist() == []


@given(st.data())
@settings(deadline=None)
def test_index_picks_whole_segments(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    x_T = torch.arange(sum(lengths)) * 10
    want = [value for row in rows for value in pieces(x_T, lengths)[row].tolist()]
    assert x_T[segment_index(cu(lengths), torch.tensor(rows, dtype=torch.int64))].tolist() == want
