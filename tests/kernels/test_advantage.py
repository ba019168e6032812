"""Advantages against a loop of generalised advantage estimation, whitening and group baselines against their formulas."""

import math
import statistics

import pytest
import torch
from tempo_kernels import advantage, group_advantage, split_values, whiten
from tempo_kernels.advantage import explained_variance, merge_moments, moments, returns, whitened_advantage
from torch import Tensor
from torch.testing import assert_close

# Three responses of 2, 0 and 1 tokens, and their 3, 1 and 2 values.
CU = torch.tensor([0, 2, 2, 3])
LENGTHS = [[1], [2, 1], [1, 0, 3], [0, 5, 0], [64, 1, 127]]


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def values_per_sequence(value_TS: Tensor, lengths: list[int]) -> list[list[float]]:
    """T_i + 1 values of each sequence."""
    values = iter(value_TS.tolist())
    return [[next(values) for _ in range(length + 1)] for length in lengths]


def gae(reward: float, baseline: list[float], gamma: float = 1.0, lam: float = 1.0) -> list[float]:
    """Generalised advantage estimation with the reward on the last token and nothing after it (arXiv 1506.02438, eq. 16)."""
    advantages, following, next_value = [], 0.0, 0.0
    for t in reversed(range(len(baseline))):
        delta = (reward if t == len(baseline) - 1 else 0.0) + gamma * next_value - baseline[t]
        following = delta + gamma * lam * following
        next_value = baseline[t]
        advantages.insert(0, following)
    return advantages


def test_values_split_into_baselines_and_terminal_values():
    baseline_T, terminal_S = split_values(torch.tensor([1.0, 2, 3, 4, 5, 6]), CU)
    assert baseline_T.tolist() == [1, 2, 5]
    assert terminal_S.tolist() == [3, 4, 6]


def test_no_sequences_split_into_nothing():
    baseline_T, terminal_S = split_values(torch.zeros(0), torch.tensor([0]))
    assert len(baseline_T) == len(terminal_S) == 0


def test_gradients_of_a_split_return_to_where_the_values_stood():
    value_TS = torch.zeros(6, requires_grad=True)
    baseline_T, terminal_S = split_values(value_TS, CU)
    (baseline_T * torch.tensor([1.0, 2, 5])).sum().backward(retain_graph=True)
    (terminal_S * torch.tensor([3.0, 4, 6])).sum().backward()
    assert value_TS.grad is not None
    assert value_TS.grad.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_wrong_number_of_values_is_answered_with_wanted_and_got():
    with pytest.raises(ValueError, match=r"3 sequences with 3 tokens have 6 values .*got shape \(5,\)"):
        split_values(torch.zeros(5), CU)


def test_values_must_be_a_vector():
    with pytest.raises(ValueError, match=r"got shape \(6, 1\)"):
        split_values(torch.zeros(6, 1), CU)


def test_advantage_uses_each_sequence_s_own_outcome():
    value_TS = torch.tensor([0.5, 0.5, 9.0, 0.2, 0.1, 9.0])
    advantage_T = advantage(torch.tensor([1.0, 0.25]), value_TS, torch.tensor([0, 2, 4]))
    assert_close(advantage_T, torch.tensor([0.5, 0.5, 0.05, 0.15]))


def test_a_sequence_without_tokens_has_no_advantage():
    advantage_T = advantage(torch.tensor([1.0, 77.0, 2.0]), torch.tensor([1.0, 2, 3, 4, 5, 6]), CU)
    assert advantage_T.tolist() == [0, -1, -3]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_advantage_of_a_label_equals_gae_with_gamma_and_lambda_1(lengths: list[int]):
    value_TS = torch.rand(sum(lengths) + len(lengths)) * 2 - 1
    outcome_S = torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(lengths))])
    baselines = [values[:-1] for values in values_per_sequence(value_TS, lengths)]
    want = [a for r, baseline in zip(outcome_S.tolist(), baselines, strict=True) for a in gae(r, baseline)]
    assert advantage(outcome_S, value_TS, cu(lengths)).tolist() == pytest.approx(want, abs=1e-6)


def test_with_the_last_prefix_value_as_outcome_the_last_token_has_no_advantage():
    lengths = [1, 4, 2]
    value_TS = torch.randn(sum(lengths) + len(lengths))
    last_prefix_S = torch.tensor([values[-2] for values in values_per_sequence(value_TS, lengths)])
    advantage_T = advantage(last_prefix_S, value_TS, cu(lengths))
    assert advantage_T[cu(lengths)[1:] - 1].tolist() == [0, 0, 0]


def test_advantages_telescope_to_differences_of_values():
    lengths = [1, 5, 0, 3]
    value_TS = torch.randn(sum(lengths) + len(lengths))
    advantage_T = advantage(torch.randn(4), value_TS, cu(lengths))
    for i, values in enumerate(values_per_sequence(value_TS, lengths)):
        own = advantage_T[cu(lengths)[i] : cu(lengths)[i + 1]].tolist()
        falls = [own[t] - own[t + 1] for t in range(len(own) - 1)]
        assert falls == pytest.approx([values[t + 1] - values[t] for t in range(len(own) - 1)], abs=1e-6)


def test_gradient_of_the_advantage_is_plus_tokens_for_the_outcome_and_minus_one_for_each_baseline():
    outcome_S = torch.zeros(3, requires_grad=True)
    value_TS = torch.zeros(6, requires_grad=True)
    advantage(outcome_S, value_TS, CU).sum().backward()
    assert outcome_S.grad is not None
    assert value_TS.grad is not None
    assert outcome_S.grad.tolist() == [2, 0, 1]
    assert value_TS.grad.tolist() == [-1, -1, 0, 0, -1, 0]


def test_the_terminal_value_is_no_baseline():
    value_TS = torch.tensor([0.5, 0.5, 0.5])
    moved_TS = torch.tensor([0.5, 0.5, 123.0])
    outcome_S, cu_seqlens = torch.ones(1), torch.tensor([0, 2])
    assert torch.equal(advantage(outcome_S, value_TS, cu_seqlens), advantage(outcome_S, moved_TS, cu_seqlens))


def test_half_precision_values_give_a_float32_advantage():
    value_TS = torch.tensor([0.99609375, 0.0], dtype=torch.bfloat16)
    advantage_T = advantage(torch.tensor([1.0], dtype=torch.bfloat16), value_TS, torch.tensor([0, 1]))
    assert advantage_T.dtype == torch.float32
    assert advantage_T.item() == 2**-8


def test_outcomes_must_be_as_many_as_sequences():
    with pytest.raises(ValueError, match=r"one outcome per sequence \(3\), got 2"):
        advantage(torch.zeros(2), torch.zeros(6), CU)


def test_baselines_may_come_without_terminal_values():
    outcome_S, value_TS = torch.tensor([1.0, 0.25, 3.0]), torch.randn(6)
    baseline_T, _ = split_values(value_TS, CU)
    assert torch.equal(advantage(outcome_S, baseline_T, CU), advantage(outcome_S, value_TS, CU))


def test_without_outcomes_each_sequence_s_own_terminal_value_counts():
    value_TS = torch.randn(6, requires_grad=True)
    advantage_T = advantage(None, value_TS, CU)
    assert torch.equal(advantage_T, advantage(split_values(value_TS, CU)[1], value_TS, CU))
    advantage_T.sum().backward()
    assert value_TS.grad is not None
    assert value_TS.grad.tolist() == [-1, -1, 2, 0, -1, 1]


def test_a_wrong_number_of_values_is_answered_with_both_numbers_allowed():
    with pytest.raises(ValueError, match=r"6 values .* or 3 without the terminal ones, got shape \(5,\)"):
        advantage(torch.zeros(3), torch.zeros(5), CU)


def test_without_outcomes_the_terminal_values_must_be_there():
    with pytest.raises(ValueError, match=r"6 values \(one more than tokens in each\), got shape \(3,\)"):
        advantage(None, torch.zeros(3), CU)


def test_the_return_of_a_token_is_the_outcome_of_its_sequence():
    assert returns(torch.tensor([1.0, 77.0, 2.0]), CU).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match=r"one outcome per sequence \(3\), got 2"):
        returns(torch.zeros(2), CU)


def whitened(x: list[float], center: bool = True) -> list[float]:
    """The definition for one population of at least two."""
    mean = statistics.fmean(x) if center else 0.0
    variance = statistics.variance(x) if center else statistics.fmean(value**2 for value in x)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in x]


def test_whitening_by_hand():
    # Mean 4 and unbiased variance (9 + 1 + 16) / 2 = 13.
    white_T = whiten(torch.tensor([1.0, 3.0, 8.0]), torch.zeros(3, dtype=torch.int64))
    assert_close(white_T, torch.tensor([-3.0, -1.0, 4.0]) / math.sqrt(13))


@pytest.mark.parametrize("center", [True, False])
def test_whitening_matches_its_definition_per_population(center: bool):
    advantage_T = torch.randn(201) * 3 + 5
    population_T = torch.tensor([3, 1, 0])[torch.randint(3, (201,))]
    white_T = whiten(advantage_T, population_T, center=center)
    for population in (3, 1, 0):
        rows = population_T == population
        want = whitened(advantage_T[rows].tolist(), center)
        assert white_T[rows].tolist() == pytest.approx(want, abs=1e-5)


def test_whitened_advantages_have_mean_0_and_variance_1_in_every_population():
    advantage_T = torch.cat([torch.randn(3) * 100, torch.randn(1000) * 0.01 + 1])
    population_T = torch.tensor([0] * 3 + [1] * 1000)
    white_T = whiten(advantage_T, population_T)
    for population in (0, 1):
        own = white_T[population_T == population].double()
        assert float(own.mean()) == pytest.approx(0, abs=1e-6)
        assert float(own.var()) == pytest.approx(1, abs=1e-3)


def test_one_population_does_not_feel_another():
    advantage_T, population_T = torch.randn(10), torch.tensor([0] * 6 + [1] * 4)
    louder_T = torch.where(population_T == 1, 1000 * advantage_T + 9, advantage_T)
    alone_T = whiten(advantage_T[:6], population_T[:6])
    assert torch.equal(whiten(louder_T, population_T)[:6], alone_T)


def test_plus_minus_one_and_zero_one_targets_give_the_same_whitened_advantage():
    lengths = [3, 1, 0, 7]
    zero_one_S = torch.tensor([1.0, 0.0, 1.0, 0.0])
    probability_TS = torch.rand(sum(lengths) + len(lengths))
    population_T = torch.zeros(sum(lengths), dtype=torch.int64)
    zero_one_T = whiten(advantage(zero_one_S, probability_TS, cu(lengths)), population_T)
    plus_minus_T = whiten(advantage(2 * zero_one_S - 1, 2 * probability_TS - 1, cu(lengths)), population_T)
    assert_close(zero_one_T, plus_minus_T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 5.0])
def test_whitening_forgets_an_affine_change_of_outcomes_and_values(scale: float, shift: float):
    outcome_S, value_TS, cu_seqlens = torch.randn(2), torch.randn(9), torch.tensor([0, 2, 7])
    population_T = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    plain_T = whiten(advantage(outcome_S, value_TS, cu_seqlens), population_T)
    changed_T = whiten(advantage(scale * outcome_S + shift, scale * value_TS + shift, cu_seqlens), population_T)
    # The shift costs float32 digits before whitening: 5 beside 0.1.
    assert_close(changed_T, plain_T, atol=2e-4, rtol=2e-4)


def test_whitening_without_centring_keeps_every_sign():
    advantage_T = torch.tensor([0.1, 0.2, 5.0, -0.3, 0.0])
    white_T = whiten(advantage_T, torch.zeros(5, dtype=torch.int64), center=False)
    assert torch.equal(white_T.sign(), advantage_T.sign())


def test_equal_advantages_whiten_to_0():
    assert whiten(torch.full((4,), 0.7), torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 0, 0]


def test_a_population_of_one_token_is_centred_to_0():
    assert whiten(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 1, 0]))[1] == 0


def test_advantages_that_hardly_differ_stay_bounded_without_centring():
    white_T = whiten(torch.tensor([0.7, 0.7001, 0.7]), torch.zeros(3, dtype=torch.int64), center=False)
    assert_close(white_T, torch.ones(3), atol=1e-3, rtol=0)


def test_whitening_nothing_gives_nothing():
    assert whiten(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_whitening_takes_half_precision_and_returns_float32():
    white_T = whiten(torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))
    assert white_T.dtype == torch.float32
    assert white_T.tolist() == pytest.approx(whitened([1.0, 2.0, 4.0]), abs=1e-6)


def test_moments_by_hand():
    # 1, 3 and 8: mean 4, squared distances 9 + 1 + 16; nobody belongs to population 1.
    got = moments(torch.tensor([1.0, 5, 3, 8]), torch.tensor([0, 2, 0, 0]), 3)
    assert [x.tolist() for x in got] == [[3, 0, 1], [4, 0, 5], [26, 0, 0]]
    assert {x.dtype for x in got} == {torch.float64}


def test_moments_of_parts_merge_into_those_of_the_whole():
    advantage_T, population_T = torch.randn(200) * 3 + 1000, torch.randint(3, (200,))
    pieces = [slice(0, 7), slice(7, 7), slice(7, 8), slice(8, 200)]
    merged = merge_moments([moments(advantage_T[i], population_T[i], 3) for i in pieces])
    for one, other in zip(merged, moments(advantage_T, population_T, 3), strict=True):
        assert_close(one, other, rtol=1e-12, atol=0)


def test_moments_do_not_lose_a_small_spread_beside_a_large_mean():
    # E[A^2] - E[A]^2 would have no digit left, not even in float64.
    advantage_T = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) + 1e9
    parts = [moments(x, torch.zeros(len(x), dtype=torch.int64), 1) for x in (advantage_T[:1], advantage_T[1:])]
    assert merge_moments(parts).m2_P.item() == pytest.approx(2)


def test_moments_of_other_populations_do_not_merge():
    two, three = (moments(torch.zeros(2), torch.zeros(2, dtype=torch.int64), n) for n in (2, 3))
    with pytest.raises(ValueError, match=r"same populations, got \[\(2,\), \(3,\)\]"):
        merge_moments([two, three])
    with pytest.raises(ValueError, match=r"same populations, got \[\]"):
        merge_moments([])


@pytest.mark.parametrize("center", [True, False])
def test_ranks_that_merge_their_moments_whiten_as_one(center: bool):
    advantage_T, population_T = torch.randn(50) + 2, torch.randint(2, (50,))
    ranks = [slice(0, 20), slice(20, 50)]
    statistics = merge_moments([moments(advantage_T[i], population_T[i], 2) for i in ranks])
    parts = [whiten(advantage_T[i], population_T[i], center=center, statistics=statistics) for i in ranks]
    assert_close(torch.cat(parts), whiten(advantage_T, population_T, center=center), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outside", [[-1, 0], [0, 2]])
def test_populations_are_small_consecutive_integers(outside: list[int]):
    with pytest.raises(ValueError, match=f"within 0..1, got {outside[0]}..{outside[1]}"):
        moments(torch.zeros(2), torch.tensor(outside), 2)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool)])
def test_each_advantage_needs_one_population(wrong: Tensor):
    with pytest.raises(ValueError, match="one integer population for each of 3"):
        whiten(torch.zeros(3), wrong)


@pytest.mark.parametrize("center", [True, False])
def test_whitened_advantage_is_advantage_and_whiten(center: bool):
    lengths = [3, 1, 0, 7]
    outcome_S, value_TS = torch.randn(4), torch.randn(15)
    population_S = torch.tensor([0, 1, 1, 0])
    white_T, statistics = whitened_advantage(
        outcome_S, value_TS, cu(lengths), population_S, num_populations=2, center=center
    )
    advantage_T, population_T = advantage(outcome_S, value_TS, cu(lengths)), returns(population_S, cu(lengths))
    assert torch.equal(white_T, whiten(advantage_T, population_T, center=center))
    assert statistics.count_P.tolist() == [10, 1]


def test_whitened_advantage_uses_the_statistics_of_all_ranks():
    outcome_S, value_TS, population_S = torch.randn(4), torch.randn(15), torch.zeros(4, dtype=torch.int64)
    whole_T, _ = whitened_advantage(outcome_S, value_TS, cu([3, 1, 0, 7]), population_S, num_populations=1)
    other = moments(advantage(outcome_S[2:], value_TS[6:], cu([0, 7])), torch.zeros(7, dtype=torch.int64), 1)
    part_T, _ = whitened_advantage(
        outcome_S[:2], value_TS[:6], cu([3, 1]), population_S[:2], num_populations=1,
        merge=lambda own: merge_moments([own, other]),
    )  # fmt: skip
    assert_close(part_T, whole_T[:4])


def test_explained_variance_by_hand():
    # Returns 0, 1, 2, 3 with variance 5/4; residuals 0, 0, 0, 1 with variance 3/16.
    value_N, return_N = torch.tensor([0.0, 1, 2, 2]), torch.tensor([0.0, 1, 2, 3])
    assert explained_variance(value_N, return_N).item() == pytest.approx(1 - 3 / 20)
    assert explained_variance(return_N - 7, return_N) == 1
    assert explained_variance(torch.zeros(4), return_N) == 0


def test_explained_variance_counts_tokens_by_their_weights():
    value_N, return_N, weight_N = torch.randn(5), torch.randn(5), torch.tensor([1, 2, 0, 1, 3])
    repeated = explained_variance(value_N.repeat_interleave(weight_N), return_N.repeat_interleave(weight_N))
    assert_close(explained_variance(value_N, return_N, weight_N), repeated)


@pytest.mark.parametrize("weight", [[0.1, 0.2, 0.0], [0.0, 0.0, 0.0]])
def test_returns_that_do_not_vary_have_no_explained_variance(weight: list[float]):
    return_N = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64)
    assert explained_variance(torch.randn(3), return_N, torch.tensor(weight)).isnan()
    assert explained_variance(torch.randn(0), torch.randn(0)).isnan()


def test_explained_variance_keeps_its_digits_beside_a_large_mean():
    value_N, return_N = torch.randn(2, 100, dtype=torch.float64)
    shifted = explained_variance(value_N + 1e8, return_N + 1e8)
    assert shifted.item() == pytest.approx(explained_variance(value_N, return_N).item(), rel=1e-6)


def test_explained_variance_needs_one_shape():
    with pytest.raises(ValueError, match=r"of one shape, got \[\(2,\), \(3,\)\]"):
        explained_variance(torch.zeros(2), torch.zeros(3))


def test_group_advantage_without_std_is_the_distance_from_the_group_s_mean():
    outcome_S = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0])
    group_S = torch.tensor([0, 0, 0, 0, 1, 1])
    got_S = group_advantage(outcome_S, group_S, divide_by_std=False)
    assert got_S.tolist() == [0.75, -0.25, -0.25, -0.25, -1, 1]


def test_group_advantage_with_std_by_hand():
    # Outcomes 1, 0, 1, 0: distances +-1/2, unbiased variance 1/3.
    got_S = group_advantage(torch.tensor([1.0, 0, 1, 0]), torch.zeros(4, dtype=torch.int64), divide_by_std=True)
    assert_close(got_S, torch.tensor([1.0, -1, 1, -1]) * math.sqrt(3) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_group_advantage_matches_a_loop_over_uneven_interleaved_groups(divide_by_std: bool):
    outcome_S, group_S = (
        torch.randn(23),
        torch.tensor([2, 0, 0, 3, 2, 0, 4, 4, 2, 0, 0, 4, 3, 2, 2, 0, 4, 3, 0, 2, 0, 4, 1]),
    )
    members = {g: outcome_S[group_S == g].tolist() for g in range(5)}
    want = []
    for outcome, group in zip(outcome_S.tolist(), group_S.tolist(), strict=True):
        own = members[group]
        scale = (statistics.stdev(own) if len(own) > 1 else 1.0) + 1e-6 if divide_by_std else 1.0
        want.append((outcome - statistics.fmean(own)) / scale)
    got_S = group_advantage(outcome_S, group_S, divide_by_std=divide_by_std)
    assert got_S.tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_unanimous_group_has_no_advantage(divide_by_std: bool):
    group_S = torch.tensor([0, 0, 0, 1, 1])
    got_S = group_advantage(torch.tensor([0.1, 0.1, 0.1, 1.0, 1.0]), group_S, divide_by_std=divide_by_std)
    assert_close(got_S, torch.zeros(5), atol=1e-7, rtol=0)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_group_of_one_has_no_advantage(divide_by_std: bool):
    assert group_advantage(torch.tensor([3.0]), torch.tensor([0]), divide_by_std=divide_by_std).tolist() == [0]


def test_group_advantage_with_std_is_the_same_for_both_kinds_of_target():
    outcome_S, group_S = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    zero_one_S = group_advantage(outcome_S, group_S, divide_by_std=True)
    plus_minus_S = group_advantage(2 * outcome_S - 1, group_S, divide_by_std=True)
    assert_close(zero_one_S, plus_minus_S, atol=1e-5, rtol=0)


def test_no_sequences_have_no_group_advantage():
    empty_S = group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64), divide_by_std=True)
    assert empty_S.tolist() == []
