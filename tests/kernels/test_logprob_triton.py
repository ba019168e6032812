"""The kernels of gather_logprob in Triton's interpreter against float64."""

import math

import pytest
import torch
from tempo_kernels.logprob import TokenStats, gather_logprob, gather_logprob_reference
from torch import Tensor

pytestmark = pytest.mark.usefixtures("triton_runs_it")


def inputs(T: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, targets, temperatures, upstream gradients); every third token has none."""
    slope_MT = torch.randn(3, T)
    slope_MT[:, 1::3] = 0
    return (4 * torch.randn(T, V)).to(dtype), torch.randint(V, (T,)), torch.rand(T) + 0.5, slope_MT


def run(op, logits_TV: Tensor, slope_MT: Tensor) -> tuple[TokenStats, Tensor]:
    leaf_TV = logits_TV.clone().requires_grad_()
    stats = op(leaf_TV * 1)
    total_T = sum(slope_T * x_T for slope_T, x_T in zip(slope_MT, stats[:3], strict=True))
    return stats, torch.autograd.grad(total_T.sum(), leaf_TV)[0]  # pyright: ignore[reportAttributeAccessIssue]


def assert_as_good_as_eager(
    got: tuple[TokenStats, Tensor], eager: tuple[TokenStats, Tensor], truth: tuple[TokenStats, Tensor]
) -> None:
    """No further from the truth than twice what eager PyTorch is."""
    one_M, other_M, true_M = ((*stats[:3], slope_TV) for stats, slope_TV in (got, eager, truth))
    for one, other, true in zip(one_M, other_M, true_M, strict=True):
        error, allowed = (float((x.detach().double() - true.detach()).abs().max()) for x in (one, other))
        assert error <= 2 * allowed + 2e-6 * max(1.0, float(true.detach().abs().max()))
    assert torch.equal(got[0].is_top1_T, truth[0].is_top1_T)


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (1, 1025), (9, 1023), (4, 2500)], ids=str)
def test_kernels_match_the_definition_forward_and_backward(size, dtype, is_in_place):
    logits_TV, target_T, temperature_T, slope_MT = inputs(size[0], size[1], dtype)
    target_T[0] = size[1] - 1

    def eager(logits_TV: Tensor) -> TokenStats:
        return gather_logprob_reference(logits_TV, target_T, temperature=temperature_T)

    got = run(
        lambda z: gather_logprob(z, target_T, temperature=temperature_T, in_place_backward=is_in_place),
        logits_TV,
        slope_MT,
    )
    assert_as_good_as_eager(got, run(eager, logits_TV, slope_MT), run(eager, logits_TV.double(), slope_MT.double()))
    assert got[1].dtype == dtype


@pytest.mark.parametrize("T", [127, 129])
def test_kernels_match_the_definition_for_many_tokens(T):
    logits_TV, target_T, _, slope_MT = inputs(T, 40)

    def eager(logits_TV: Tensor) -> TokenStats:
        return gather_logprob_reference(logits_TV, target_T)

    got = run(lambda z: gather_logprob(z, target_T), logits_TV, slope_MT)
    assert_as_good_as_eager(got, run(eager, logits_TV, slope_MT), run(eager, logits_TV.double(), slope_MT.double()))


@pytest.mark.parametrize("shift", [-120.0, 50.0, -1e4])
def test_a_shift_of_all_logits_moves_only_the_logsumexp(shift):
    logits_TV, target_T, *_ = inputs(3, 1500)
    logits_TV = (logits_TV * 256).round() / 256  # the shifted logits are exact too
    plain, shifted = gather_logprob(logits_TV, target_T), gather_logprob(logits_TV + shift, target_T)
    assert torch.equal(shifted.entropy_T, plain.entropy_T)
    assert torch.equal(shifted.logprob_T, plain.logprob_T)
    assert torch.allclose(shifted.logsumexp_T, plain.logsumexp_T + shift)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_padded_columns_have_no_probability_and_no_gradient(is_in_place):
    logits_TV, target_T, _, slope_MT = inputs(3, 1100)
    padded_TV = torch.cat([logits_TV, torch.full((3, 1000), 1e4)], 1)

    def padded(logits_TV: Tensor) -> TokenStats:
        return gather_logprob(logits_TV, target_T, vocab_size=1100, in_place_backward=is_in_place)

    got, slope_TV = run(padded, padded_TV, slope_MT)
    want, want_TV = run(lambda z: gather_logprob(z, target_T), logits_TV, slope_MT)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert torch.equal(slope_TV[:, :1100], want_TV)
    assert (slope_TV[:, 1100:] == 0).all()


def test_logits_of_minus_infinity_have_probability_0():
    logits_TV, target_T, _, slope_MT = inputs(3, 1500)
    masked_TV = logits_TV.clone()
    masked_TV[:, 700:1200] = -math.inf
    got, slope_TV = run(lambda z: gather_logprob(z, target_T % 700), masked_TV, slope_MT)
    kept_TV = torch.cat([logits_TV[:, :700], logits_TV[:, 1200:]], 1)
    want, want_TV = run(lambda z: gather_logprob(z, target_T % 700), kept_TV, slope_MT)
    for one, other in zip(got[:3], want[:3], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(torch.cat([slope_TV[:, :700], slope_TV[:, 1200:]], 1), want_TV, atol=1e-5)
    assert (slope_TV[:, 700:1200] == 0).all()


@pytest.mark.parametrize("is_in_place", [False, True])
def test_rows_without_upstream_gradient_get_zeros_whatever_their_logits_hold(is_in_place):
    logits_TV, target_T, _, slope_MT = inputs(5, 30)
    logits_TV[1] = math.nan
    got, slope_TV = run(
        lambda z: gather_logprob(z, target_T, in_place_backward=is_in_place), logits_TV, slope_MT.nan_to_num()
    )
    assert got.logprob_T[1].isnan()
    assert (slope_TV[1] == 0).all()
    assert slope_TV.isfinite().all()


def test_rows_and_columns_may_be_strided():
    logits_TV, target_T, _, slope_MT = inputs(6, 50)
    want, want_TV = run(lambda z: gather_logprob(z, target_T), logits_TV, slope_MT)
    for strided in (lambda z: torch.cat([z, z], 1)[:, :50], lambda z: z.T.contiguous().T):
        got, slope_TV = run(
            lambda z, strided=strided: gather_logprob(strided(z), target_T, in_place_backward=True),
            logits_TV,
            slope_MT,
        )
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert torch.equal(slope_TV, want_TV)


def test_the_same_inputs_give_the_same_bits_in_any_order_of_programs(in_any_order):
    logits_TV, target_T, temperature_T, slope_MT = inputs(7, 2500, torch.bfloat16)

    def once() -> list[Tensor]:
        stats, slope_TV = run(
            lambda z: gather_logprob(z, target_T, temperature=temperature_T, in_place_backward=True),
            logits_TV,
            slope_MT,
        )
        return [*stats, slope_TV]

    first, second = once(), once()
    in_any_order()
    shuffled = once()
    for one, other, third in zip(first, second, shuffled, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_a_token_s_bits_do_not_depend_on_its_batch():
    logits_TV, target_T, *_ = inputs(5, 1500)
    together = gather_logprob(logits_TV, target_T)
    alone = gather_logprob(logits_TV[3:4], target_T[3:4])
    assert all(torch.equal(one[3:4], other) for one, other in zip(together, alone, strict=True))


def test_in_place_what_needs_the_logits_again_is_told_so():
    logits_TV, target_T, *_ = inputs(3, 20)
    total = gather_logprob(logits_TV.requires_grad_().tanh(), target_T, in_place_backward=True).logprob_T.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_in_place_a_second_backward_says_why_it_cannot_work():
    logits_TV, target_T, *_ = inputs(3, 20)
    total = gather_logprob(logits_TV.requires_grad_() * 1, target_T, in_place_backward=True).logprob_T.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by its first backward pass"):
        total.backward()


def test_no_tokens_have_no_statistics():
    logits_TV, target_T, _, slope_MT = inputs(0, 5)
    stats, slope_TV = run(lambda z: gather_logprob(z, target_T), logits_TV, slope_MT)
    assert [x.tolist() for x in stats] == [[], [], [], []]
    assert slope_TV.shape == (0, 5)
