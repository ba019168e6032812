"""Accuracy over samples, diversity, and the critic's calibration. Pure functions on numpy arrays."""

# Shape letters: P = prompts, K = samples of a prompt, N = responses
from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np


def pass_at_k(correct_PK: np.ndarray, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased: mean over prompts of 1 - C(n - c, k) / C(n, k)
    (arXiv 2107.03374, eq. 1). Raises ValueError when k exceeds the number of samples."""
    n = correct_PK.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k wants 1 <= k <= {n} (the number of samples), got {k}")
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in correct_PK.sum(1)]))


def majority_at_k(answers: Sequence[Sequence[str | None]], is_right: Sequence[frozenset[str]]) -> float:
    """Accuracy of the most frequent answer among a prompt's samples, mean over prompts.

    Responses without an answer do not vote. Among tied answers each is chosen with equal chance.
    """
    scores = []
    for group, right in zip(answers, is_right, strict=True):
        tied = modes(group)
        scores.append(sum(answer in right for answer in tied) / len(tied) if tied else 0.0)
    return float(np.mean(scores))


def modes(answers: Sequence[str | None]) -> list[str]:
    """The most frequent answers (several when tied), None left out."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return [answer for answer, count in votes.items() if count == most]


def distinct_answers(answers: Sequence[Sequence[str | None]]) -> float:
    """Different answers in a group of samples, mean over prompts; "no answer" counts as one."""
    return float(np.mean([len(set(group)) for group in answers]))


def auroc(score_N: np.ndarray, correct_N: np.ndarray) -> float:
    """Chance that a right response scores above a wrong one, ties counting half (Mann-Whitney); NaN when all agree."""
    num_right, num_wrong = int((correct_N > 0.5).sum()), int((correct_N <= 0.5).sum())
    if not num_right or not num_wrong:
        return float("nan")
    _, inverse, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank_N[correct_N > 0.5].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def correlation(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Pearson's, between -1 and 1; NaN where one of them is the same number throughout."""
    if len(first_N) == 0 or np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return float("nan")
    return float(np.corrcoef(first_N, second_N)[0, 1])


def auroc_within(score_PK: np.ndarray, correct_PK: np.ndarray) -> float:
    """AUROC among the samples of one prompt, mean over the prompts that have both kinds: what an advantage needs."""
    each = [auroc(scores, correct) for scores, correct in zip(score_PK, correct_PK, strict=True)]
    each = [value for value in each if not np.isnan(value)]
    return float(np.mean(each)) if each else float("nan")


def brier(probability_N: np.ndarray, correct_N: np.ndarray) -> float:
    """Mean squared difference between probability and outcome."""
    return float(np.mean((probability_N - correct_N) ** 2))


def expected_calibration_error(probability_N: np.ndarray, correct_N: np.ndarray, bins: int = 10) -> float:
    """Mean |confidence - accuracy| over bins of equal mass; equal probabilities stay in one bin."""
    return float(sum(n / len(correct_N) * abs(p - c) for n, p, c in reliability(probability_N, correct_N, bins)))


def reliability(probability_N: np.ndarray, correct_N: np.ndarray, bins: int = 10) -> list[tuple[int, float, float]]:
    """(responses, mean probability, share that is right) of each of at most `bins` bins of equal mass: what the expected
    calibration error adds up, and a reliability diagram shows."""
    order = np.argsort(probability_N, kind="stable")
    p, c = probability_N[order], correct_N[order]
    edges = [round(i * len(p) / bins) for i in range(1, bins)]
    # Move an edge past equal values: a bin must not depend on the order of ties.
    edges = sorted({int(np.searchsorted(p, p[edge], side="left")) for edge in edges if edge < len(p)})
    parts = [(a, b) for a, b in zip([0, *edges], [*edges, len(p)], strict=True) if b > a]
    return [(b - a, float(p[a:b].mean()), float(c[a:b].mean())) for a, b in parts]
