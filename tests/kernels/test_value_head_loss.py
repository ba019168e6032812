"""The value head fused with its loss against its parts, and metrics and bins worked out by hand."""

import math
from typing import Any

import pytest
import torch
from tempo_kernels import value_loss, value_of, value_score
from tempo_kernels.value_head import METRICS, ValueLoss, value_head, value_head_loss
from torch import Tensor
from torch.testing import assert_close


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def head_inputs(N: int, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """(hidden, weight, bias), (return, row weight, old value)."""
    hidden_ND, weight_D, bias = torch.randn(N, D), torch.randn(D) / D**0.5, torch.tensor(0.2)
    return tuple(
        x.to(dtype)
        for x in (hidden_ND, weight_D, bias, (torch.rand(N) < 0.5).float(), torch.rand(N), torch.randn(N) * 0.3)
    )


def rms_norm(hidden_ND: Tensor, norm_weight_D: Tensor | None) -> Tensor:
    if norm_weight_D is None:
        return hidden_ND
    rows = [h_D / (h_D.square().mean() + 1e-6).sqrt() * norm_weight_D for h_D in hidden_ND]
    return torch.stack(rows) if rows else hidden_ND


LOSSES: list[dict[str, Any]] = [
    {"head": "linear"},
    {"head": "sigmoid"},
    {"head": "sigmoid", "loss": "bce"},
    {"head": "linear", "clip": "token"},
    {"head": "sigmoid", "clip": "sequence_mean"},
]


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("N", [1, 9])
def test_value_head_loss_is_value_loss_of_the_score_of_the_normalised_state(N, options, is_normed):
    *leaves, return_N, weight_N, old_value_N = head_inputs(N, 5)
    leaves += [torch.rand(5, dtype=torch.float64) + 0.5] if is_normed else []
    leaves = [x.requires_grad_() for x in leaves]
    hidden_ND, weight_D, bias = leaves[:3]
    norm_weight_D = leaves[3] if is_normed else None
    options = {"old_value_N": old_value_N, "cu_seqlens_S1": cu([N // 2, 0, N - N // 2]), **options}
    got = value_head_loss(hidden_ND, weight_D, bias, return_N, weight_N, norm_weight_D=norm_weight_D, **options)
    score_N = value_score(rms_norm(hidden_ND, norm_weight_D), weight_D, bias)
    want = value_loss(score_N, return_N, weight_N, **options)
    assert_close(got.total, want.total)
    assert_close(got.value_N, value_of(score_N, options["head"]).detach())
    for name, metric in want.metrics.items():
        assert_close(got.metrics[name], metric)
    for one, other in zip(torch.autograd.grad(got.total, leaves), torch.autograd.grad(want.total, leaves), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("head", ["linear", "sigmoid"])
@pytest.mark.parametrize("is_normed", [False, True])
def test_value_head_matches_finite_differences_and_its_parts(head, is_normed):
    hidden_ND, weight_D, bias, *_ = head_inputs(4, 5)
    norm_weight_D = torch.rand(5, dtype=torch.float64) + 0.5 if is_normed else None

    def values(hidden_ND, weight_D, bias, norm_weight_D=None) -> Tensor:
        return value_head(hidden_ND, weight_D, bias, head=head, norm_weight_D=norm_weight_D)

    want = value_of(value_score(rms_norm(hidden_ND, norm_weight_D), weight_D, bias), head)
    assert_close(values(hidden_ND, weight_D, bias, norm_weight_D), want)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_D, bias, norm_weight_D) if x is not None]
    assert torch.autograd.gradcheck(values, leaves)


def test_the_norm_is_transformers_norm_without_its_rounding():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(6, eps=1e-5)
    torch.nn.init.uniform_(norm.weight)
    hidden_ND, weight_D, bias, *_ = head_inputs(7, 6, torch.float32)
    got = value_head(hidden_ND, weight_D, bias, norm_weight_D=norm.weight, norm_eps=1e-5)
    assert_close(got, value_score(norm(hidden_ND), weight_D, bias))


@pytest.mark.parametrize(("weight_shape", "bias_shape"), [((3,), ()), ((1, 3), (1,))])
def test_weights_of_a_linear_layer_fit_as_they_are(weight_shape, bias_shape):
    hidden_ND, weight_D, bias, *_ = head_inputs(2, 3)
    want = value_head(hidden_ND, weight_D, bias)
    weight, bias = weight_D.reshape(weight_shape).requires_grad_(), bias.reshape(bias_shape).requires_grad_()
    got = value_head(hidden_ND, weight, bias)
    assert_close(got, want, check_dtype=False)
    got.sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert (weight.grad.shape, bias.grad.shape) == (weight_shape, bias_shape)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("is_normed", [False, True])
def test_masked_rows_contribute_nothing_whatever_they_hold(options, is_normed):
    *leaves, return_N, weight_N, old_value_N = head_inputs(6, 4)
    leaves += [torch.rand(4, dtype=torch.float64)] if is_normed else []
    is_masked_N = torch.tensor([True, False, False, True, True, False])
    weight_N[is_masked_N] = 0

    def run(rows: Tensor, lengths: list[int]) -> tuple[ValueLoss, tuple[Tensor, ...]]:
        own = [leaves[0][rows].requires_grad_(), *(x.clone().requires_grad_() for x in leaves[1:])]
        hidden_ND, weight_D, bias = own[:3]
        norm_weight_D = own[3] if is_normed else None
        loss = value_head_loss(
            hidden_ND, weight_D, bias, return_N[rows], weight_N[rows], old_value_N=old_value_N[rows],
            cu_seqlens_S1=cu(lengths), norm_weight_D=norm_weight_D, **options,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss.total, own)

    want, (want_hidden, *want_others) = run((~is_masked_N).nonzero()[:, 0], [2, 1])
    for x in (leaves[0], return_N, old_value_N):
        x[is_masked_N] = math.nan
    got, (got_hidden, *got_others) = run(torch.arange(6), [4, 2])
    assert_close([got.total, *got.metrics.values(), got.bins_3B], [want.total, *want.metrics.values(), want.bins_3B])
    assert_close([got_hidden[~is_masked_N], *got_others], [want_hidden, *want_others])
    assert (got_hidden[is_masked_N] == 0).all()
    assert (got.value_N[is_masked_N] == 0).all()


def test_metrics_by_hand():
    # Values 0.5 and 2 for returns 1 and 1; errors 0.5 and -1.
    loss = value_head_loss(
        torch.tensor([[0.5], [2.0]]), torch.ones(1), torch.zeros(()), torch.ones(2), torch.tensor([0.25, 0.5]),
        clip="token", clip_range=0.5, old_value_N=torch.tensor([0.5, 0.0]),
    )  # fmt: skip
    # The second value moved 2, beyond 0.5: its clipped loss, 0.125, is the smaller one.
    want = {
        "critic/vf_loss": 0.25 * 0.125 + 0.5 * 0.5,
        "critic/vpred_mean": 0.25 * 0.5 + 0.5 * 2,
        "critic/abs_error": 0.25 * 0.5 + 0.5,
        "critic/vf_clipfrac": 0.0,
        "critic/weight": 0.75,
        "critic/return_mean": 0.75,
        "critic/return_square": 0.75,
        "critic/error_mean": 0.25 * 0.5 - 0.5,
        "critic/error_square": 0.25 * 0.25 + 0.5,
    }
    assert tuple(want) == METRICS
    assert {name: metric.item() for name, metric in loss.metrics.items()} == pytest.approx(want)
    assert not any(metric.requires_grad for metric in loss.metrics.values())
    assert not loss.value_N.requires_grad


def test_the_clip_fraction_counts_the_weight_of_clipped_losses():
    loss = value_head_loss(
        torch.tensor([[0.5], [0.05], [0.5]]), torch.ones(1), torch.zeros(()), torch.tensor([1.0, 1.0, 0.0]),
        torch.tensor([0.25, 0.5, 0.25]), clip="token", clip_range=0.1, old_value_N=torch.zeros(3),
    )  # fmt: skip
    assert loss.metrics["critic/vf_clipfrac"].item() == 0.25


def test_the_explained_variance_follows_from_the_metrics():
    hidden_ND, weight_D, bias, return_N, weight_N, _ = head_inputs(30, 4)
    loss = value_head_loss(hidden_ND, weight_D, bias, return_N, weight_N)
    m = {name.removeprefix("critic/"): float(metric) for name, metric in loss.metrics.items()}
    error = m["error_square"] / m["weight"] - (m["error_mean"] / m["weight"]) ** 2
    spread = m["return_square"] / m["weight"] - (m["return_mean"] / m["weight"]) ** 2

    def variance(x_N: Tensor) -> float:
        mean = (weight_N * x_N).sum() / weight_N.sum()
        return float((weight_N * (x_N - mean) ** 2).sum() / weight_N.sum())

    assert 1 - error / spread == pytest.approx(1 - variance(return_N - loss.value_N) / variance(return_N))


def test_bins_by_hand():
    # Bins [-1, 0) and [0, 1]: values beyond the range are clamped into the first and the last.
    hidden_ND = torch.tensor([[-5.0], [-0.5], [0.0], [1.0], [7.0]])
    loss = value_head_loss(
        hidden_ND, torch.ones(1), torch.zeros(()), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]), num_bins=2, value_range=(-1.0, 1.0),
    )  # fmt: skip
    assert loss.bins_3B.tolist() == [[3, 7], [-2, 4], [-1, -1]]
    assert loss.bins_3B.dtype == torch.float32


@pytest.mark.parametrize("clip", ["none", "sequence_mean"])
def test_micro_batches_of_metrics_and_bins_add_up_to_the_minibatch(clip):
    hidden_ND, weight_D, bias, return_N, weight_N, old_value_N = head_inputs(8, 4)

    def part(rows: slice, lengths: list[int]) -> ValueLoss:
        return value_head_loss(
            hidden_ND[rows], weight_D, bias, return_N[rows], weight_N[rows], head="sigmoid", clip=clip,
            old_value_N=old_value_N[rows], cu_seqlens_S1=cu(lengths),
        )  # fmt: skip

    whole, first, second = part(slice(0, 8), [3, 1, 4]), part(slice(0, 4), [3, 1]), part(slice(4, 8), [4])
    assert_close(first.total + second.total, whole.total)
    assert_close(first.bins_3B + second.bins_3B, whole.bins_3B)
    for name, metric in whole.metrics.items():
        assert_close(first.metrics[name] + second.metrics[name], metric)


def test_no_rows_lose_nothing_and_fill_no_bin():
    hidden_ND, weight_D, bias, return_N, weight_N, old_value_N = head_inputs(0, 4)
    options = {"clip": "sequence_mean", "old_value_N": old_value_N, "cu_seqlens_S1": cu([0])}
    loss = value_head_loss(hidden_ND, weight_D, bias.requires_grad_(), return_N, weight_N, **options)
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.bins_3B.tolist() == [[0] * 10] * 3
    assert bias.grad == 0


def test_masked_rows_are_not_in_the_mean_movement_of_a_sequence():
    options = {"clip": "sequence_mean", "clip_range": 0.1}
    weight_N = f64(1.0, 0.0, 1.0)
    got = value_loss(
        f64(0.3, 9.0, 0.5), f64(1, 1, 1), weight_N, old_value_N=f64(0, 0, 0), cu_seqlens_S1=cu([3]), **options
    )
    want = value_loss(f64(0.3, 0.5), f64(1, 1), f64(1, 1), old_value_N=f64(0, 0), cu_seqlens_S1=cu([2]), **options)
    assert_close(got.total, want.total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(2, 3, 1)}, "want hidden"),
        ({"weight_D": torch.zeros(4)}, r"want weight \[3\] or \[1, 3\] on cpu, got \[4\]"),
        ({"weight_D": torch.zeros(3, 1)}, r"want weight .* got \[3, 1\]"),
        ({"bias": torch.zeros(2)}, r"want bias \[\] or \[1\] on cpu, got \[2\]"),
        ({"norm_weight_D": torch.zeros(2)}, r"want norm_weight \[3\] on cpu, got \[2\]"),
        ({"return_N": torch.zeros(3)}, r"one shape, got \[\(2,\), \(3,\), \(2,\)\]"),
        ({"head": "tanh"}, "head must be one of linear, sigmoid, got 'tanh'"),
        ({"loss": "bce"}, "bce wants a sigmoid head"),
        ({"clip": "token"}, "needs old_value_N"),
        ({"clip": "token", "old_value_N": torch.zeros(1)}, r"one old value per row \(2\)"),
        ({"clip": "sequence_mean", "old_value_N": torch.zeros(2)}, "needs cu_seqlens_S1"),
        (
            {"clip": "sequence_mean", "old_value_N": torch.zeros(2), "cu_seqlens_S1": torch.tensor([0, 3])},
            "must end at 2, the number of rows, got 3",
        ),
        ({"num_bins": 0}, "at least one bin"),
        ({"value_range": (1.0, 1.0)}, "at least one bin"),
    ],
)
def test_inputs_of_the_fused_loss_that_do_not_fit_are_refused(change, message):
    arguments: dict[str, Any] = {"hidden_ND": torch.zeros(2, 3), "weight_D": torch.zeros(3), "bias": torch.zeros(())}
    arguments |= {"return_N": torch.zeros(2), "weight_N": torch.ones(2), **change}
    with pytest.raises(ValueError, match=message):
        value_head_loss(**arguments)


def test_an_unknown_head_is_refused_by_value_head():
    with pytest.raises(ValueError, match="head must be one of linear, sigmoid, got 'tanh'"):
        value_head(torch.zeros(2, 3), torch.zeros(3), torch.zeros(()), head="tanh")  # pyright: ignore[reportArgumentType]
