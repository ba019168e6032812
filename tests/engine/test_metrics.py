"""Metrics against brute force: all subsets for pass@k, all pairs for AUROC, all ways to break a tie for maj@k."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.metrics import (
    auroc,
    auroc_within,
    brier,
    correlation,
    distinct_answers,
    expected_calibration_error,
    majority_at_k,
    modes,
    pass_at_k,
    reliability,
)

corrects = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4).map(np.array)
scored = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), st.booleans()), max_size=12)


@given(corrects, st.integers(1, 5))
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_subsets_of_k_samples_with_a_right_one(correct_PK: np.ndarray, k: int):
    shares = [np.mean([any(subset) for subset in combinations(row, k)]) for row in correct_PK.tolist()]
    assert pass_at_k(correct_PK, k) == pytest.approx(np.mean(shares))


@given(corrects)
@settings(deadline=None)
def test_pass_at_k_grows_with_k(correct_PK: np.ndarray):
    each = [pass_at_k(correct_PK, k) for k in range(1, 6)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(each))


@given(corrects)
@settings(deadline=None)
def test_pass_at_1_is_the_mean(correct_PK: np.ndarray):
    assert pass_at_k(correct_PK, 1) == pytest.approx(correct_PK.mean())


@given(corrects)
@settings(deadline=None)
def test_pass_at_all_samples_asks_whether_any_is_right(correct_PK: np.ndarray):
    assert pass_at_k(correct_PK, 5) == correct_PK.any(1).mean()


def test_pass_at_2_of_one_right_sample_in_four_is_a_half():
    assert pass_at_k(np.array([[0.0, 1.0, 0.0, 0.0]]), 2) == 0.5


@pytest.mark.parametrize("k", [0, -1, 4])
def test_pass_at_k_refuses_k_beyond_the_samples(k: int):
    with pytest.raises(ValueError, match=rf"1 <= k <= 3 .*got {k}"):
        pass_at_k(np.ones((2, 3)), k)


def test_modes_are_all_the_most_frequent_answers():
    assert modes(["7", "8", "7", "9", "8", None, None, None]) == ["7", "8"]


@pytest.mark.parametrize("answers", [[], [None, None]])
def test_without_answers_there_is_no_mode(answers):
    assert modes(answers) == []


def test_the_majority_decides():
    assert majority_at_k([["7", "8", "7"], ["7", "8", "8"]], [frozenset({"7"}), frozenset({"7"})]) == 0.5


def test_tied_answers_share_the_vote():
    assert majority_at_k([["7", "8", "9", "7", "8", "9"]], [frozenset({"8"})]) == pytest.approx(1 / 3)


def test_missing_answers_do_not_vote():
    assert majority_at_k([[None, None, None, "7"]], [frozenset({"7"})]) == 1


def test_a_prompt_without_any_answer_is_wrong():
    assert majority_at_k([[None, None], ["7", "7"]], [frozenset({"7"}), frozenset({"7"})]) == 0.5


def test_any_of_several_right_answers_counts():
    assert majority_at_k([["7", "8"]], [frozenset({"7", "8"})]) == 1


def test_every_group_needs_its_right_answers():
    with pytest.raises(ValueError, match="zip"):
        majority_at_k([["7"], ["8"]], [frozenset({"7"})])


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=8), st.permutations(range(8)))
@settings(deadline=None)
def test_the_order_of_samples_does_not_change_the_majority(answers, order):
    shuffled = [answers[i] for i in order if i < len(answers)]
    right = [frozenset({"2"})]
    assert majority_at_k([answers], right) == majority_at_k([shuffled], right)


def test_no_answer_counts_as_one_more_distinct_answer():
    assert distinct_answers([["7", "7", None, None], ["7", "8", "9"]]) == 2.5


@given(scored)
@settings(deadline=None)
def test_auroc_is_the_share_of_pairs_ranked_right_with_ties_counting_half(rows):
    score_N, correct_N = np.array([s for s, _ in rows]), np.array([c for _, c in rows], dtype=float)
    pairs = [(right > wrong) + 0.5 * (right == wrong) for right, r in rows if r for wrong, w in rows if not w]
    got = auroc(score_N, correct_N)
    if pairs:
        assert got == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(got)


def test_auroc_of_equal_scores_is_a_half():
    assert auroc(np.zeros(4), np.array([1, 0, 0, 1])) == 0.5


@pytest.mark.parametrize("correct", [[], [1, 1], [0, 0, 0]])
def test_auroc_is_nan_when_all_agree(correct: list[int]):
    assert math.isnan(auroc(np.arange(len(correct)), np.array(correct)))


def test_auroc_within_ranks_each_prompt_by_itself():
    # Ranked right within each prompt, although every score of the second exceeds every score of the first.
    score_PK, correct_PK = np.array([[0.1, 0.2], [0.8, 0.9]]), np.array([[0, 1], [0, 1]])
    assert auroc_within(score_PK, correct_PK) == 1
    assert auroc(score_PK.ravel(), correct_PK.ravel()) == 0.75


def test_auroc_within_leaves_unanimous_prompts_out():
    score_PK, correct_PK = np.array([[0.1, 0.2], [0.5, 0.4], [0.3, 0.4]]), np.array([[1, 1], [0, 1], [0, 1]])
    assert auroc_within(score_PK, correct_PK) == 0.5


def test_auroc_within_is_nan_when_every_prompt_is_unanimous():
    assert math.isnan(auroc_within(np.zeros((2, 3)), np.array([[1, 1, 1], [0, 0, 0]])))


def test_a_correlation_is_pearsons():
    a, b = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 5.0])
    assert correlation(a, b) == pytest.approx(5 / math.sqrt(2 * 14))  # of deviations (-1, 0, 1) and (-2, -1, 3)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5]])
def test_what_does_not_vary_has_no_correlation(values: list[float]):
    assert math.isnan(correlation(np.array(values), np.arange(float(len(values)))))


def test_brier_by_hand():
    assert brier(np.array([1.0, 0.5, 0.0, 0.8]), np.array([1, 1, 0, 0])) == pytest.approx((0.25 + 0.64) / 4)


def test_a_sure_and_right_critic_has_brier_0():
    assert brier(np.array([1.0, 0.0]), np.array([True, False])) == 0


def test_calibration_error_by_hand():
    # Two bins of two: confidence 0.2 against accuracy 0, and 0.8 against 0.5.
    probability_N, correct_N = np.array([0.9, 0.1, 0.7, 0.3]), np.array([1, 0, 0, 0])
    assert expected_calibration_error(probability_N, correct_N, bins=2) == pytest.approx(0.5 * 0.2 + 0.5 * 0.3)


def test_one_bin_compares_the_means():
    probability_N, correct_N = np.array([0.9, 0.1, 0.8]), np.array([1, 0, 0])
    assert expected_calibration_error(probability_N, correct_N, bins=1) == pytest.approx(0.6 - 1 / 3)


def test_equal_probabilities_stay_in_one_bin():
    # In bins of two by rank, the four 0.5 would be torn apart and show an error of 0.5.
    probability_N, correct_N = np.full(4, 0.5), np.array([1, 1, 0, 0])
    assert expected_calibration_error(probability_N, correct_N, bins=2) == 0


def test_bins_of_reliability_by_hand():
    probability_N, correct_N = np.array([0.9, 0.1, 0.3, 0.7]), np.array([1.0, 0.0, 1.0, 1.0])
    assert reliability(probability_N, correct_N, bins=2) == [(2, pytest.approx(0.2), 0.5), (2, pytest.approx(0.8), 1.0)]
    assert reliability(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == [(2, 0.5, 0.5)]


@given(scored.filter(bool), st.integers(1, 12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_calibration_error_does_not_depend_on_the_order_of_ties(rows, bins: int, random):
    shuffled = random.sample(rows, len(rows))
    both = []
    for each in (rows, shuffled):
        probability_N, correct_N = np.array([s for s, _ in each]), np.array([c for _, c in each])
        both.append(expected_calibration_error(probability_N, correct_N, bins))
    assert both[0] == pytest.approx(both[1])


@given(scored.filter(bool), st.integers(1, 30))
@settings(deadline=None)
def test_calibration_error_lies_between_the_difference_of_means_and_the_mean_difference(rows, bins: int):
    probability_N, correct_N = np.clip([s for s, _ in rows], 0, 1), np.array([float(c) for _, c in rows])
    error = expected_calibration_error(probability_N, correct_N, bins)
    assert abs(np.mean(probability_N - correct_N)) - 1e-9 <= error <= np.mean(abs(probability_N - correct_N)) + 1e-9


def test_more_bins_than_responses_give_each_response_its_own():
    probability_N, correct_N = np.array([0.2, 0.9]), np.array([1, 1])
    assert expected_calibration_error(probability_N, correct_N, bins=50) == pytest.approx((0.8 + 0.1) / 2)
