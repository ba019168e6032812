"""linear_logprob against log-probabilities computed token by token in float64, whole and in chunks."""

import importlib
import math
from typing import Any

import pytest
import torch
from tempo_kernels import TokenStats, linear_logprob
from torch import Tensor
from torch.testing import assert_close

SIZES = [(1, 1, 1), (1, 3, 5), (7, 4, 11), (130, 8, 33)]
OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.5, "softcap": 3.0}]


def inputs(T: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64)
    return hidden_TD, head_VD, bias_V, torch.randint(V, (T,), generator=generator)


def definition(hidden_TD, head_VD, bias_V, target_T, temperature=1.0, softcap=None) -> TokenStats:
    """Token by token from the formulas."""
    rows = []
    for hidden_D, target in zip(hidden_TD, target_T.tolist(), strict=True):
        logit_V = (head_VD * hidden_D).sum(1) + bias_V
        if softcap is not None:
            logit_V = softcap * (logit_V / softcap).tanh()
        logit_V = logit_V / temperature
        probability_V = logit_V.exp() / logit_V.exp().sum()
        entropy = -(probability_V * probability_V.log()).sum()
        is_top1 = logit_V[target] == logit_V.max()
        rows.append((probability_V[target].log(), entropy, logit_V.exp().sum().log(), is_top1))
    return TokenStats(*(torch.stack(column) for column in zip(*rows, strict=True)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows_at_a_time", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_logprob_matches_its_definition_forward(size, options, rows_at_a_time):
    hidden_TD, head_VD, bias_V, target_T = inputs(*size)
    budget = {} if rows_at_a_time is None else {"max_bytes": 4 * len(head_VD) * rows_at_a_time}
    got = linear_logprob(hidden_TD, head_VD, target_T, bias_V=bias_V, **options, **budget)
    for one, other in zip(got, definition(hidden_TD, head_VD, bias_V, target_T, **options), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("rows_at_a_time", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 5), (7, 4, 11), (20, 8, 33)], ids=str)
def test_linear_logprob_matches_its_definition_backward(size, options, rows_at_a_time):
    hidden_TD, head_VD, bias_V, target_T = inputs(*size)
    budget = {} if rows_at_a_time is None else {"max_bytes": 4 * len(head_VD) * rows_at_a_time}
    slope_T, slope_entropy_T, slope_sum_T = torch.randn(3, len(hidden_TD), dtype=torch.float64)

    def gradients(stats_of) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden_TD, head_VD, bias_V)]
        stats = stats_of(*leaves)
        total_T = stats.logprob_T * slope_T + stats.entropy_T * slope_entropy_T + stats.logsumexp_T * slope_sum_T
        return torch.autograd.grad(total_T.sum(), leaves)

    got = gradients(lambda h, w, b: linear_logprob(h, w, target_T, bias_V=b, **options, **budget))
    want = gradients(lambda h, w, b: definition(h, w, b, target_T, **options))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_gradients_in_chunks_match_finite_differences():
    hidden_TD, head_VD, bias_V, target_T = inputs(5, 2, 3)
    leaves = [x.requires_grad_() for x in (hidden_TD, head_VD, bias_V)]

    def stats(hidden_TD, head_VD, bias_V):
        options = {"temperature": 0.8, "softcap": 4.0, "max_bytes": 4 * 3 * 2}
        return linear_logprob(hidden_TD, head_VD, target_T, bias_V=bias_V, **options)[:3]

    assert torch.autograd.gradcheck(stats, leaves)


def logits(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that give exactly these logits."""
    head_VD = torch.eye(len(rows[0]), dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64), head_VD


def test_two_tokens_by_hand():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4.
    stats = linear_logprob(*logits([0.0, math.log(3)], [0.0, math.log(3)]), torch.tensor([0, 1]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert stats.logprob_T.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert stats.entropy_T.tolist() == pytest.approx([entropy, entropy])
    assert stats.logsumexp_T.tolist() == pytest.approx([math.log(4)] * 2)
    assert stats.is_top1_T.tolist() == [False, True]


def test_temperature_divides_the_logits():
    stats = linear_logprob(*logits([0.0, 2 * math.log(3)]), torch.tensor([1]), temperature=2.0)
    assert stats.logprob_T.item() == pytest.approx(math.log(0.75))


def test_softcap_comes_before_temperature():
    # 10 tanh(1e6 / 10) = 10, then 10 / 5 = 2.
    stats = linear_logprob(*logits([0.0, 1e6]), torch.tensor([0]), temperature=5.0, softcap=10.0)
    assert stats.logprob_T.item() == pytest.approx(-math.log(1 + math.exp(2)))


def test_the_bias_is_capped_with_the_logits():
    bias_V = torch.tensor([0.0, 1e6], dtype=torch.float64)
    stats = linear_logprob(*logits([0.0, 0.0]), torch.tensor([0]), bias_V=bias_V, softcap=2.0)
    assert stats.logprob_T.item() == pytest.approx(-math.log(1 + math.exp(2)))


def test_a_vocabulary_of_one_leaves_no_choice():
    stats = linear_logprob(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.int64))
    assert_close(stats.logprob_T, torch.zeros(3))
    assert_close(stats.entropy_T, torch.zeros(3), atol=1e-6, rtol=0)
    assert stats.is_top1_T.all()


def test_equal_logits_have_the_entropy_of_a_uniform_choice():
    stats = linear_logprob(torch.zeros(1, 2), torch.randn(50, 2), torch.tensor([7]))
    assert stats.entropy_T.item() == pytest.approx(math.log(50), rel=1e-5)


def test_huge_logits_stay_finite():
    stats = linear_logprob(*logits([1e4, -1e4, 0.0]), torch.tensor([1]))
    assert stats.logprob_T.item() == -2e4
    assert stats.entropy_T.item() == pytest.approx(0)


@pytest.mark.parametrize("max_bytes", [0, 1, 10**9])
def test_no_tokens_have_no_statistics(max_bytes: int):
    empty_T = torch.zeros(0, dtype=torch.int64)
    stats = linear_logprob(torch.zeros(0, 4), torch.randn(3, 4), empty_T, max_bytes=max_bytes)
    assert [len(part) for part in stats] == [0, 0, 0, 0]


@pytest.mark.parametrize("max_bytes", [1, 10**9])
def test_half_precision_hidden_states_give_float32_statistics(max_bytes: int):
    hidden_TD, head_VD, bias_V, target_T = (x.bfloat16() if x.is_floating_point() else x for x in inputs(3, 4, 5))
    stats = linear_logprob(hidden_TD, head_VD, target_T, bias_V=bias_V, max_bytes=max_bytes)
    assert [part.dtype for part in stats] == [torch.float32] * 3 + [torch.bool]


@pytest.mark.parametrize(("max_bytes", "most_rows"), [(0, 1), (43, 1), (44, 1), (88, 2), (131, 2), (10**6, 7)])
def test_no_more_logits_than_the_budget_exist_at_a_time(monkeypatch, max_bytes: int, most_rows: int):
    # One row of 11 float32 logits is 44 bytes; a single row is taken even where it exceeds the budget.
    module = importlib.import_module("tempo_kernels.linear_logprob")
    reference, seen = module.linear_logprob_reference, []

    def counting(hidden_TD, *rest):
        seen.append(len(hidden_TD))
        return reference(hidden_TD, *rest)

    monkeypatch.setattr(module, "linear_logprob_reference", counting)
    hidden_TD, head_VD, _, target_T = inputs(7, 4, 11)
    linear_logprob(hidden_TD, head_VD, target_T, max_bytes=max_bytes)
    assert max(seen) == most_rows
    assert sum(seen) == 7


def test_frozen_weights_get_no_gradient_in_chunks():
    hidden_TD, head_VD, _, target_T = inputs(7, 4, 11)
    hidden_TD.requires_grad_()
    linear_logprob(hidden_TD, head_VD, target_T, max_bytes=1).logprob_T.sum().backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is None


def test_hidden_and_head_of_different_size_are_answered_with_both_shapes():
    with pytest.raises(ValueError, match=r"want hidden \[T, D\] and head \[V, D\], got \(2, 3\) and \(5, 4\)"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))


def test_batched_hidden_states_are_refused():
    with pytest.raises(ValueError, match=r"got \(1, 2, 3\) and \(5, 3\)"):
        linear_logprob(torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.int64))


def test_a_wrong_number_of_targets_is_answered_with_wanted_and_got():
    with pytest.raises(ValueError, match=r"one target per row of hidden \(2\), got shape \(3,\)"):
        linear_logprob(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("temperature", "softcap"), [(0.0, None), (-1.0, None), (1.0, 0.0), (1.0, -2.0)])
def test_temperature_and_softcap_must_be_positive(temperature: float, softcap: float | None):
    with pytest.raises(ValueError, match=f"must be positive, got {temperature} and {softcap}"):
        linear_logprob(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), temperature=temperature, softcap=softcap
        )
