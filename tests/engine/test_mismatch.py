"""Statistics of the distance between sampler and trainer, by hand and against their definitions in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.mismatch import mismatch

differences = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


def of(*responses: Sequence[float], band: float = 0.1, sampler: float = 0.0) -> dict[str, float]:
    """Statistics of responses whose tokens the trainer gives this much more log-prob."""
    d_T = torch.tensor([d for response in responses for d in response])
    cu_responses_S1 = torch.tensor([0, *(len(response) for response in responses)]).cumsum(0)
    sampler_logprob_T = torch.full_like(d_T, sampler)
    found = mismatch(sampler_logprob_T, sampler_logprob_T + d_T, cu_responses_S1, band=band)
    return {name.removeprefix("rollout/"): value for name, value in found.items()}


def test_programs_that_agree_differ_by_nothing() -> None:
    assert of([0.0, 0.0], [0.0], sampler=-1.5) == {
        "logprob_diff_mean": 0.0,
        "logprob_diff_max": 0.0,
        "mismatch_kl": 0.0,
        "ess_token": 1.0,
        "ess_sequence": 1.0,
        "outside_band": 0.0,
    }


def test_one_token_of_two_is_a_tenth_off() -> None:
    found = of([0.0, 0.1], band=0.05)
    assert found["logprob_diff_mean"] == pytest.approx(0.05)
    assert found["logprob_diff_max"] == pytest.approx(0.1)
    assert found["mismatch_kl"] == pytest.approx((math.exp(0.1) - 1.1) / 2)
    assert found["outside_band"] == 0.5


def test_both_directions_count() -> None:
    found = of([-0.2, 0.2, 0.0, 0.0])
    assert found["logprob_diff_mean"] == pytest.approx(0.1)
    assert found["logprob_diff_max"] == pytest.approx(0.2)
    assert found["mismatch_kl"] == pytest.approx((math.exp(0.2) + math.exp(-0.2) - 2) / 4)
    assert found["outside_band"] == 0.5


def test_weights_of_1_and_3_are_worth_four_fifths_of_equal_ones() -> None:
    """(1 + 3)^2 / (2 (1 + 9)) = 0.8."""
    assert of([0.0, math.log(3)])["ess_token"] == pytest.approx(0.8)
    found = of([math.log(3) / 2, math.log(3) / 2], [0.3, -0.3])
    assert found["ess_sequence"] == pytest.approx(0.8), "a sequence's weight is the product of its tokens'"


def test_the_common_size_of_weights_does_not_matter() -> None:
    found = of([800.0, 800.0], [800.0, 800.0])
    assert (found["ess_token"], found["ess_sequence"]) == (1.0, 1.0)


def test_small_differences_are_not_rounded_away() -> None:
    """k3 of d is d^2 / 2 to first order: of 1e-6, 5e-13, which exp(d) - 1 - d in float32 would not see."""
    assert of([1e-6])["mismatch_kl"] == pytest.approx(5e-13, rel=1e-4)


def test_a_log_prob_that_is_no_number_is_seen() -> None:
    assert math.isnan(of([0.0, math.nan])["mismatch_kl"])


@settings(deadline=None)
@given(responses=differences, band=st.floats(0.01, 2))
def test_statistics_are_their_definitions(responses: list[list[float]], band: float) -> None:
    d = [x for response in responses for x in response]
    found = of(*responses, band=band)

    def effective(log_weights: list[float]) -> float:
        weights = [math.exp(x) for x in log_weights]
        return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))

    assert found == {
        "logprob_diff_mean": pytest.approx(sum(map(abs, d)) / len(d)),
        "logprob_diff_max": pytest.approx(max(map(abs, d))),
        "mismatch_kl": pytest.approx(sum(math.exp(x) - 1 - x for x in d) / len(d), abs=1e-12),
        "ess_token": pytest.approx(effective(d)),
        "ess_sequence": pytest.approx(effective([math.fsum(response) for response in responses])),
        "outside_band": sum(abs(x) > band for x in d) / len(d),
    }
