import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tempo_em.posteriors import (
    answer_entropy,
    cluster_frequency,
    coin_flip,
    critic,
    denoised,
    is_mislabelled,
    majority_vote,
)
from tempo_kernels import group_advantage

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8)


def test_the_critics_value_is_clamped_to_the_range_of_its_targets() -> None:
    values = torch.tensor([-0.5, 0.25, 1.5])
    assert critic(values, (0.0, 1.0)).tolist() == [0.0, 0.25, 1.0]
    assert critic(values, (-1.0, 1.0)).tolist() == [-0.5, 0.25, 1.0]


def test_majority_vote_by_hand() -> None:
    assert majority_vote([["a", "b", "a", None]]).tolist() == [1, 0, 1, 0]
    assert majority_vote([["b", "a"], [None, None]]).tolist() == [0, 1, 0, 0]


def test_cluster_frequency_by_hand() -> None:
    assert cluster_frequency([["a", "b", "a", None]]).tolist() == [0.5, 0.25, 0.5, 0.0]


@given(group=ANSWERS, seed=st.integers(0, 100))
def test_votes_do_not_depend_on_the_order_of_responses(group: list[str | None], seed: int) -> None:
    """I10: permuting a group permutes its outcomes."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed)).tolist()
    for posterior in (majority_vote, cluster_frequency):
        outcome = posterior([group])
        permuted = posterior([[group[i] for i in order]])
        assert torch.equal(permuted, outcome[order])


@given(group=ANSWERS)
def test_cluster_shares_add_up_over_clusters(group: list[str | None]) -> None:
    outcome = cluster_frequency([group]).tolist()
    shares = {answer: share for answer, share in zip(group, outcome, strict=True) if answer is not None}
    assert abs(sum(shares.values()) + group.count(None) / len(group) - 1) < 1e-6


def test_a_unanimous_group_has_no_advantage() -> None:
    for posterior in (majority_vote, cluster_frequency):
        outcome = posterior([["a"] * 4, [None] * 4])
        advantage = group_advantage(outcome, torch.tensor([0] * 4 + [1] * 4), divide_by_std=True)
        assert advantage.tolist() == [0.0] * 8


def test_coin_flips_are_seeded_and_fair() -> None:
    assert torch.equal(coin_flip(50, "a"), coin_flip(50, "a"))
    assert not torch.equal(coin_flip(50, "a"), coin_flip(50, "b"))
    assert abs(float(coin_flip(4000, "a").mean()) - 0.5) < 0.04


def test_the_entropy_of_answers_by_hand() -> None:
    """Halves of four: log 2 of log 4. Shares of 1/2, 1/4, 1/4: 3/2 log 2 of 2 log 2."""
    assert answer_entropy(["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert answer_entropy(["a", "a", "b", "c"]) == pytest.approx(0.75)
    assert answer_entropy(["a", "a", None, None]) == pytest.approx(0.75), "no answer agrees with no other"
    assert (answer_entropy(["a"] * 3), answer_entropy(["a", "b", None]), answer_entropy([None] * 3)) == (0.0, 1.0, 1.0)
    assert answer_entropy([None]) == 0.0


def test_corrected_outcomes_have_the_mean_of_the_true_ones() -> None:
    """A right response whose verdict is turned round one time in five: 0.8 x 4/3 - 0.2 x 1/3 = 1; a wrong one: 0."""
    wrong, right = denoised(torch.tensor([0.0, 1.0]), 0.2).tolist()
    assert (wrong, right) == (pytest.approx(-1 / 3), pytest.approx(4 / 3))
    assert 0.8 * right + 0.2 * wrong == pytest.approx(1.0)
    assert 0.2 * right + 0.8 * wrong == pytest.approx(0.0)
    assert denoised(torch.tensor([0.0, 1.0]), 0.0).tolist() == [0.0, 1.0]


def test_the_same_questions_are_mislabelled_throughout_a_run() -> None:
    questions = [f"q{i}" for i in range(4000)]
    first = [is_mislabelled(q, 0.2, seed=0) for q in questions]
    assert first == [is_mislabelled(q, 0.2, seed=0) for q in questions]
    assert first != [is_mislabelled(q, 0.2, seed=1) for q in questions]
    assert abs(sum(first) / 4000 - 0.2) < 0.02
