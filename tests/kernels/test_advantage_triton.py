"""The kernels of advantages and whitening in Triton's interpreter against float64."""

from collections.abc import Callable

import pytest
import torch
from tempo_kernels.advantage import BLOCK, advantage, merge_moments, moments, returns, whiten, whitened_advantage
from tempo_kernels.dispatch import Target, recorded
from tempo_kernels.segments import boundaries
from torch import Tensor

pytestmark = pytest.mark.usefixtures("triton_runs_it")

# One token, empty sequences, and sequences longer than one block.
LENGTHS = [[1], [127], [0, 129, 0, 1, 0], [5, BLOCK, 0, BLOCK + 1, 2 * BLOCK + 1]]
# (outcomes are given, values include the terminal ones)
LAYOUTS = [(True, True), (True, False), (False, True)]


def inputs(
    lengths: list[int], layout: tuple[bool, bool] = (True, True), dtype: torch.dtype = torch.float32
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(outcomes, values, boundaries)."""
    has_outcome, has_terminal = layout
    value_N = torch.randn(sum(lengths) + has_terminal * len(lengths)).to(dtype)
    return torch.randn(len(lengths)).to(dtype) if has_outcome else None, value_N, boundaries(torch.tensor(lengths))


def eagerly(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPO_KERNELS", "torch")
        return function()


def assert_as_good_as_eager(got: list[Tensor], eager: list[Tensor], true: list[Tensor]) -> None:
    """No further from float64 than twice what eager PyTorch is."""
    for one, other, exact in zip(got, eager, true, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.numel():
            error, allowed, size = (x.abs().max() for x in (one - exact, other - exact, exact))
            assert error <= 2 * allowed + 2e-6 * size


def with_gradients(outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor, slope_T: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (outcome_S, value_N) if x is not None]
    advantage_T = advantage(leaves[0] if len(leaves) == 2 else None, leaves[-1], cu_seqlens_S1)
    return [advantage_T.detach(), *torch.autograd.grad((slope_T * advantage_T).sum(), leaves)]


def advantage_in_float64(
    outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor, slope_T: Tensor
) -> list[Tensor]:
    """[advantages, gradients], sequence by sequence."""
    num_tokens, num_sequences = len(slope_T), len(cu_seqlens_S1) - 1
    advantages, d_outcome_S = [], torch.zeros(num_sequences, dtype=torch.float64)
    d_value_N = torch.zeros(len(value_N), dtype=torch.float64)
    for i in range(num_sequences):
        start, end = int(cu_seqlens_S1[i]), int(cu_seqlens_S1[i + 1])
        first = start + (i if len(value_N) > num_tokens else 0)
        last = first + end - start
        outcome = value_N[last] if outcome_S is None else outcome_S[i]
        advantages.append(outcome.double() - value_N[first:last].double())
        d_outcome_S[i] = slope_T[start:end].double().sum()
        d_value_N[first:last] = -slope_T[start:end]
        if outcome_S is None:
            d_value_N[last] = d_outcome_S[i]
    return [torch.cat(advantages), *([] if outcome_S is None else [d_outcome_S]), d_value_N]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_advantages_match_the_definition_forward_and_backward(lengths, layout, dtype):
    outcome_S, value_N, cu_seqlens = inputs(lengths, layout, dtype)
    slope_T = torch.randn(sum(lengths))
    got = with_gradients(outcome_S, value_N, cu_seqlens, slope_T)
    eager = eagerly(lambda: with_gradients(outcome_S, value_N, cu_seqlens, slope_T))
    assert_as_good_as_eager(got, eager, advantage_in_float64(outcome_S, value_N, cu_seqlens, slope_T))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_sequences_without_tokens_have_no_advantage(lengths):
    outcome_S, value_N, cu_seqlens = inputs(lengths)
    cu_seqlens = cu_seqlens if lengths else torch.tensor([0])
    advantage_T, d_outcome_S, d_value_N = with_gradients(outcome_S, value_N, cu_seqlens, torch.zeros(0))
    assert advantage_T.tolist() == []
    assert d_outcome_S.tolist() == d_value_N.tolist() == [0] * len(lengths)
    population_S = torch.zeros(len(lengths), dtype=torch.int64)
    white_T, statistics = whitened_advantage(outcome_S, value_N, cu_seqlens, population_S, num_populations=1)
    assert white_T.tolist() == []
    assert [x.tolist() for x in statistics] == [[0], [0], [0]]


def test_values_may_be_strided_and_boundaries_int32():
    outcome_S, value_N, cu_seqlens = inputs([2, 129])
    strided_N = torch.stack([value_N, value_N], 1)[:, 0]
    assert torch.equal(advantage(outcome_S, strided_N, cu_seqlens.int()), advantage(outcome_S, value_N, cu_seqlens))


@pytest.mark.parametrize("T", [0, 1, 127, 129, 2 * BLOCK + 1])
@pytest.mark.parametrize("num_populations", [1, 3])
def test_moments_match_float64(T, num_populations):
    advantage_T, population_T = torch.randn(T) * 3 + 1, torch.randint(num_populations, (T,))
    got = moments(advantage_T, population_T, num_populations)
    want = moments(advantage_T.double(), population_T, num_populations)
    assert torch.equal(got.count_P, want.count_P)
    assert torch.allclose(got.mean_P, want.mean_P, rtol=0, atol=1e-6)
    assert torch.allclose(got.m2_P, want.m2_P, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 127, 129, BLOCK + 1])
def test_whitening_matches_float64_whatever_the_populations(T, dtype, center):
    # population 1 is empty, and population 2 has one token
    advantage_T, population_T = (torch.randn(T) * 2 + 3).to(dtype), torch.randint(2, (T,)) * 3
    population_T[T // 2 : T // 2 + 1] = 2
    got, true = (whiten(x, population_T, center=center) for x in (advantage_T, advantage_T.double()))
    assert torch.allclose(got.double(), true, rtol=2e-6, atol=2e-6)


def test_equal_advantages_whiten_to_0_in_blocks_and_sequences_alike():
    lengths = [3, BLOCK + 7, 0, 77]
    outcome_S, value_N, cu_seqlens = torch.full((4,), 0.7), torch.zeros(sum(lengths)), boundaries(torch.tensor(lengths))
    advantage_T, zero_S = advantage(outcome_S, value_N, cu_seqlens), torch.zeros(4, dtype=torch.int64)
    assert whiten(advantage_T, returns(zero_S, cu_seqlens)).abs().max() == 0
    assert whitened_advantage(outcome_S, value_N, cu_seqlens, zero_S, num_populations=1)[0].abs().max() == 0


def test_a_small_spread_beside_a_large_mean_keeps_its_digits():
    advantage_T, zero_T = torch.randn(300) * 0.01 + 100, torch.zeros(300, dtype=torch.int64)
    got, true = (whiten(x, zero_T) for x in (advantage_T, advantage_T.double()))
    # half a last place of 100 is 4e-6, beside 0.01
    assert torch.allclose(got.double(), true, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_fused_advantage_matches_float64(lengths, center, layout):
    outcome_S, value_N, cu_seqlens = inputs(lengths, layout)
    population_S = torch.arange(len(lengths)) % 2

    def run(outcome_S: Tensor | None, value_N: Tensor) -> list[Tensor]:
        white_T, statistics = whitened_advantage(
            outcome_S, value_N, cu_seqlens, population_S, num_populations=3, center=center
        )
        return [white_T, *statistics]

    got = run(outcome_S, value_N)
    eager = eagerly(lambda: run(outcome_S, value_N))
    exact_T = advantage_in_float64(outcome_S, value_N, cu_seqlens, torch.zeros(sum(lengths)))[0]
    population_T = returns(population_S, cu_seqlens)
    true = [whiten(exact_T, population_T, center=center), *moments(exact_T, population_T, 3)]
    assert_as_good_as_eager(got, eager, true)


def test_one_population_s_nan_stays_its_own():
    outcome_S, value_N, cu_seqlens = torch.tensor([float("nan"), 1.0]), torch.randn(7), torch.tensor([0, 3, 7])
    population_S = torch.tensor([0, 1])
    white_T, _ = whitened_advantage(outcome_S, value_N, cu_seqlens, population_S, num_populations=2)
    assert white_T.isnan().tolist() == [True] * 3 + [False] * 4
    again_T = whiten(advantage(outcome_S, value_N, cu_seqlens), returns(population_S, cu_seqlens))
    assert again_T.isnan().tolist() == white_T.isnan().tolist()


def test_ranks_that_merge_their_moments_whiten_as_one():
    outcome_S, value_N, cu_seqlens = inputs([3, 129, 40], (True, False))
    assert outcome_S is not None
    zero_S = torch.zeros(3, dtype=torch.int64)
    whole_T, _ = whitened_advantage(outcome_S, value_N, cu_seqlens, zero_S, num_populations=1)
    ranks = [
        (outcome_S[:1], value_N[:3], torch.tensor([0, 3])),
        (outcome_S[1:], value_N[3:], torch.tensor([0, 129, 169])),
    ]
    own = [whitened_advantage(*rank, zero_S[: len(rank[0])], num_populations=1)[1] for rank in ranks]
    parts = [
        whitened_advantage(*rank, zero_S[: len(rank[0])], num_populations=1, merge=lambda _: merge_moments(own))[0]
        for rank in ranks
    ]
    assert torch.allclose(torch.cat(parts), whole_T, rtol=1e-6, atol=1e-7)


def bits(lengths: list[int]) -> list[list[float]]:
    torch.manual_seed(1)
    outcome_S, value_N, cu_seqlens = inputs(lengths)
    slope_T, population_T = torch.randn(sum(lengths)), torch.randint(3, (sum(lengths),))
    gradients = with_gradients(outcome_S, value_N, cu_seqlens, slope_T)
    white_T, statistics = whitened_advantage(
        outcome_S, value_N, cu_seqlens, torch.arange(len(lengths)) % 2, num_populations=2
    )
    return [x.tolist() for x in (*gradients, white_T, *statistics, whiten(gradients[0], population_T))]


def test_programs_in_any_order_give_the_same_bits_as_two_runs_do(in_any_order):
    lengths = [3, 0, 129, 1, 77, BLOCK + 3]
    first, second = bits(lengths), bits(lengths)
    in_any_order()
    assert first == second == bits(lengths)


def test_the_fused_advantage_is_two_launches():
    outcome_S, value_N, cu_seqlens = inputs([3, 4])
    with recorded(Target("cuda", 90)) as launches:
        whitened_advantage(outcome_S, value_N, cu_seqlens, torch.tensor([0, 1]), num_populations=2)
    assert len(launches) == 2
