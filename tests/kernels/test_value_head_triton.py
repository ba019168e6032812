"""The kernels of value_head in Triton's interpreter against the PyTorch path in float64."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tempo_kernels import value_head_triton
from tempo_kernels.value_head import value_head, value_head_loss
from torch import Tensor

pytestmark = pytest.mark.usefixtures("triton_runs_it")

LOSSES: list[dict[str, Any]] = [
    {"head": "linear"},
    {"head": "sigmoid", "loss": "bce"},
    {"head": "linear", "clip": "token"},
    {"head": "sigmoid", "clip": "sequence_mean"},
]


def named(tensors: list[Tensor]) -> dict[str, Any]:
    """Hidden state and weights as keyword arguments; the norm's may be missing."""
    return dict(zip(("hidden_ND", "weight_D", "bias", "norm_weight_D"), tensors, strict=False))


class Inputs:
    """Random arguments of the ops; three of ten rows are masked."""

    def __init__(self, N: int, D: int, dtype: torch.dtype = torch.float32, *, is_normed: bool = False) -> None:
        self.hidden_ND = torch.randn(N, D).to(dtype)
        self.weights = [torch.randn(D) / D**0.5, torch.tensor(0.2)]
        self.weights += [torch.rand(D) + 0.5] if is_normed else []
        self.return_N = (torch.rand(N) < 0.5).float()
        self.weight_N = torch.rand(N) * (torch.rand(N) < 0.7)
        self.old_value_N = torch.randn(N) * 0.3
        self.cu_seqlens_S1 = torch.tensor([0, 0, N // 3, N // 3, N // 3 + (N > 1), N])

    def leaves(self, dtype: torch.dtype | None) -> list[Tensor]:
        tensors = [self.hidden_ND, *self.weights]
        return [(x.clone() if dtype is None else x.to(dtype)).requires_grad_() for x in tensors]

    def loss(self, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
        """Everything value_head_loss returns, and its gradients."""
        leaves = self.leaves(dtype)
        loss = value_head_loss(
            **named(leaves), return_N=self.return_N, weight_N=self.weight_N, old_value_N=self.old_value_N,
            cu_seqlens_S1=self.cu_seqlens_S1, **options,
        )  # fmt: skip
        metrics = torch.stack(list(loss.metrics.values()))
        gradients = torch.autograd.grad(1.7 * loss.total, leaves)
        return [loss.total.detach(), metrics, loss.value_N, loss.bins_3B, *gradients]

    def values(self, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
        """value_head's values, and its gradients."""
        leaves = self.leaves(dtype)
        value_N = value_head(**named(leaves), **options)
        return [value_N.detach(), *torch.autograd.grad((value_N * self.weight_N.to(value_N.dtype)).sum(), leaves)]


def assert_as_good_as_eager(got: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> None:
    """No further from the truth than twice what eager PyTorch is."""
    for one, other, true in zip(got, eager, truth, strict=True):
        assert one.dtype == other.dtype
        if true.numel():
            error, allowed = (float((x.double() - true).abs().max()) for x in (one, other))
            assert error <= 2 * allowed + 2e-6 * max(1.0, float(true.abs().max()))


def check(run: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    got, truth = run(**options), run(torch.float64, **options)
    with monkeypatch.context() as patch:
        patch.setenv("TEMPO_KERNELS", "torch")
        eager = run(**options)
    assert_as_good_as_eager(got, eager, truth)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("size", [(1, 5), (127, 96), (129, 300)], ids=str)
def test_the_fused_loss_matches_its_definition_forward_and_backward(size, is_normed, options, monkeypatch):
    check(Inputs(*size, is_normed=is_normed).loss, monkeypatch, **options)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("is_normed", [False, True])
def test_the_fused_loss_matches_its_definition_in_bfloat16(is_normed, options, monkeypatch):
    check(Inputs(40, 96, torch.bfloat16, is_normed=is_normed).loss, monkeypatch, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_value_head_matches_its_definition_forward_and_backward(head, is_normed, dtype, monkeypatch):
    check(Inputs(129, 96, dtype, is_normed=is_normed).values, monkeypatch, head=head)


def test_a_program_that_loops_over_its_rows_gives_the_same(monkeypatch):
    # 129 rows in tiles of 32: three programs of two tiles, the last of which is not full
    monkeypatch.setattr(value_head_triton, "PROGRAMS", 3)
    for is_normed in (False, True):
        inputs = Inputs(129, 24, is_normed=is_normed)
        check(inputs.loss, monkeypatch, head="sigmoid", clip="sequence_mean")
        check(inputs.values, monkeypatch)


def test_a_wide_hidden_state_takes_few_rows_at_a_time(monkeypatch):
    check(Inputs(5, 3000, torch.bfloat16, is_normed=True).loss, monkeypatch, clip="token")


def test_a_sequence_longer_than_a_block_moves_as_one(monkeypatch):
    inputs = Inputs(1100, 4)
    inputs.cu_seqlens_S1 = torch.tensor([0, 1100])
    check(inputs.loss, monkeypatch, clip="sequence_mean", clip_range=0.01)


@pytest.mark.parametrize(("num_bins", "value_range"), [(1, (0.0, 1.0)), (3, (-1.0, 1.0)), (16, (-0.5, 0.5))])
def test_bins_match_their_definition(num_bins, value_range, monkeypatch):
    check(Inputs(70, 8).loss, monkeypatch, num_bins=num_bins, value_range=value_range)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("is_normed", [False, True])
def test_masked_rows_contribute_nothing_whatever_they_hold(is_normed, options):
    inputs = Inputs(40, 24, is_normed=is_normed)
    want = inputs.loss(**options)
    is_masked_N = inputs.weight_N == 0
    for x in (inputs.hidden_ND, inputs.return_N, inputs.old_value_N):
        x[is_masked_N] = math.nan
    got = inputs.loss(**options)
    assert is_masked_N.any()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert (got[2][is_masked_N] == 0).all()
    assert (got[4][is_masked_N] == 0).all()


def test_when_everything_is_masked_nothing_is_lost():
    inputs = Inputs(33, 24, is_normed=True)
    inputs.weight_N.zero_()
    inputs.hidden_ND.fill_(math.nan)
    for options in LOSSES:
        assert all((x == 0).all() for x in inputs.loss(**options))


def test_no_rows_lose_nothing():
    inputs = Inputs(0, 24)
    for options in LOSSES:
        assert all((x == 0).all() for x in inputs.loss(**options))


def test_rows_and_columns_may_be_strided(monkeypatch):
    inputs = Inputs(20, 24, is_normed=True)
    want = inputs.loss()
    for strided_ND in (torch.cat([inputs.hidden_ND] * 2, 1)[:, :24], inputs.hidden_ND.T.contiguous().T):
        leaf_ND = strided_ND.detach().requires_grad_()
        loss = value_head_loss(**named([leaf_ND, *inputs.weights]), return_N=inputs.return_N, weight_N=inputs.weight_N)
        (1.7 * loss.total).backward()
        assert torch.equal(loss.total, want[0])
        assert leaf_ND.grad is not None
        assert torch.equal(leaf_ND.grad, want[4])


def test_the_same_inputs_give_the_same_bits_in_any_order_of_programs(in_any_order):
    inputs = Inputs(129, 24, torch.bfloat16, is_normed=True)

    def once() -> list[Tensor]:
        return [*inputs.loss(head="sigmoid", clip="sequence_mean"), *inputs.values()]

    first, second = once(), once()
    in_any_order()
    for one, other, shuffled in zip(first, second, once(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, shuffled)


@pytest.mark.parametrize("is_normed", [False, True])
def test_a_frozen_hidden_state_costs_no_gradient(is_normed, monkeypatch):
    inputs = Inputs(20, 24, is_normed=is_normed)
    want = inputs.loss()
    launched = []
    launch = value_head_triton.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(value_head_triton, "launch", counted)
    leaves = [x.clone().requires_grad_() for x in inputs.weights]
    loss = value_head_loss(**named([inputs.hidden_ND, *leaves]), return_N=inputs.return_N, weight_N=inputs.weight_N)
    for one, other in zip(torch.autograd.grad(1.7 * loss.total, leaves), want[5:], strict=True):
        assert torch.equal(one, other)
    assert len(launched) == 2  # one pass, one sum


def test_frozen_weights_cost_no_gradient_either():
    inputs = Inputs(20, 24)
    want = inputs.loss()
    leaf_ND = inputs.hidden_ND.clone().requires_grad_()
    loss = value_head_loss(**named([leaf_ND, *inputs.weights]), return_N=inputs.return_N, weight_N=inputs.weight_N)
    (1.7 * loss.total).backward()
    assert leaf_ND.grad is not None
    assert torch.equal(leaf_ND.grad, want[4])


def test_hidden_sizes_beyond_the_registers_run_in_pytorch(monkeypatch):
    # by its path: the package's name for it is the function
    monkeypatch.setattr(importlib.import_module("tempo_kernels.value_head"), "MAX_HIDDEN_SIZE", 23)
    inputs = Inputs(3, 24)
    monkeypatch.setattr(value_head_triton, "launch", lambda *a, **k: pytest.fail("a kernel was launched"))
    inputs.loss()
    inputs.values()


def test_a_norm_without_epsilon_ignores_masked_and_missing_rows():
    hidden_ND, weight_D, return_N = torch.randn(7, 24), torch.randn(24), torch.rand(7)
    weight_N = torch.tensor([0.2, 0.0, 0.2, 0.2, 0.0, 0.2, 0.2])
    totals = [
        value_head_loss(
            hidden_ND.to(dtype),
            weight_D,
            torch.zeros(1),
            return_N,
            weight_N,
            norm_weight_D=torch.ones(24),
            norm_eps=0.0,
        ).total
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(totals[0].double(), totals[1].double())
