"""The kernel of policy_loss in Triton's interpreter against float64, forward and backward."""

import math
from typing import Any

import pytest
import torch
from tempo_kernels.dispatch import Target, recorded
from tempo_kernels.policy_loss import Loss, effective_sample_size, policy_loss
from tempo_kernels.policy_loss_triton import BLOCK, MAXES, Constants, Objective, gradients_triton
from tempo_kernels.segments import boundaries
from torch import Tensor

pytestmark = pytest.mark.usefixtures("triton_runs_it")

KINDS = ["ppo", "gspo", "reinforce"]
# One token, empty sequences, and sequences longer than one block.
LENGTHS = [[1], [127], [0, 129, 0, 1, 0], [5, BLOCK, 0, BLOCK + 1, 2 * BLOCK + 1]]
CLIPS = {"clip_low": 0.15, "clip_high": 0.3}
EVERYTHING = CLIPS | {"dual_clip": 1.5, "entropy_coef": 0.1, "kl_coef": 0.2, "importance_cap": 1.1}


def inputs(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Every tensor that policy_loss takes, and the boundaries."""
    old_T, ratio_T, ref_T, sampler_T, advantage_T = torch.randn(5, sum(lengths))
    named = {
        "logprob_T": old_T + 0.6 * ratio_T,
        "old_logprob_T": old_T,
        "advantage_T": advantage_T,
        "weight_T": torch.rand(sum(lengths)) / sum(lengths),
        "entropy_T": torch.rand(sum(lengths)),
        "ref_logprob_T": old_T + 0.3 * ref_T,
        "sampler_logprob_T": old_T + 0.2 * sampler_T,
    }
    return {name: x.to(dtype) for name, x in named.items()}, boundaries(torch.tensor(lengths))


def run(named: dict[str, Tensor], cu_seqlens_S1: Tensor, options: dict[str, Any]) -> tuple[Loss, list[Tensor | None]]:
    """The loss and its gradients in logprob and entropy; 3 times the loss, for an upstream gradient that is not 1."""
    named = dict(named)
    leaves = [named[name].clone().requires_grad_() for name in ("logprob_T", "entropy_T") if name in named]
    named |= zip(("logprob_T", "entropy_T"), leaves, strict=False)
    loss = policy_loss(cu_seqlens_S1=cu_seqlens_S1, **named, **options)
    return loss, list(torch.autograd.grad(3 * loss.total, leaves, allow_unused=True))


def eagerly(
    named: dict[str, Tensor], cu_seqlens_S1: Tensor, options: dict[str, Any]
) -> tuple[Loss, list[Tensor | None]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPO_KERNELS", "torch")
        return run(named, cu_seqlens_S1, options)


def assert_as_good_as_eager(named: dict[str, Tensor], cu_seqlens_S1: Tensor, options: dict[str, Any]) -> None:
    """Loss, metrics and gradients are no further from float64 than twice what eager PyTorch is."""
    (got, got_grads), (eager, eager_grads) = (f(named, cu_seqlens_S1, options) for f in (run, eagerly))
    true, true_grads = run({name: x.double() for name, x in named.items()}, cu_seqlens_S1, options)
    assert list(got.metrics) == list(true.metrics)
    scalars = [(x.total, *x.metrics.values()) for x in (got, eager, true)]
    for is_sum, triples in (
        (1.0, zip(*scalars, strict=True)),
        (0.0, zip(got_grads, eager_grads, true_grads, strict=True)),
    ):
        for one, other, exact in triples:
            assert (one is None) == (other is None) == (exact is None)
            if one is not None and other is not None and exact is not None and one.numel():
                assert one.dtype == other.dtype
                error, allowed, size = (x.detach().abs().max() for x in (one - exact, other - exact, exact))
                # sums of numbers around 1, which may cancel
                assert error <= 2 * allowed + 2e-6 * size + 2e-7 * is_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_matches_the_definition_forward_and_backward(kind, lengths, dtype):
    assert_as_good_as_eager(*inputs(lengths, dtype), {"kind": kind, **EVERYTHING})


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_matches_the_definition_without_the_optional_inputs(kind):
    named, cu_seqlens = inputs([0, 129, 2])
    del named["entropy_T"], named["ref_logprob_T"], named["sampler_logprob_T"]
    assert_as_good_as_eager(named, cu_seqlens, {"kind": kind, **CLIPS})


def test_the_kernel_matches_the_definition_for_k1():
    assert_as_good_as_eager(*inputs([129, 2]), {"kind": "ppo", "kl": "k1", "kl_coef": 0.2})


def test_inputs_without_coefficients_are_only_measured():
    named, cu_seqlens = inputs([3, 4])
    assert_as_good_as_eager(named, cu_seqlens, {"kind": "ppo"})
    assert run(named, cu_seqlens, {"kind": "ppo"})[1][1] is None


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # an importance of e^200, before its cap
def test_lost_tokens_overflow_nothing_and_get_no_gradient_from_the_bounds():
    named, cu_seqlens = inputs([4])
    named["old_logprob_T"] = named["logprob_T"] - torch.tensor([500.0, 500, 0, -500])
    named["ref_logprob_T"] = named["logprob_T"] + torch.tensor([500.0, -500, 500, 0])
    named["sampler_logprob_T"] = named["old_logprob_T"] - torch.tensor([200.0, 0, -200, 0])
    named["advantage_T"] = torch.tensor([-1.0, 1, -1, 1])
    assert_as_good_as_eager(named, cu_seqlens, {"kind": "ppo", **EVERYTHING})
    assert_as_good_as_eager(named, cu_seqlens, {"kind": "ppo", **CLIPS, "kl_coef": 1.0})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_a_batch_without_tokens_loses_nothing(kind, lengths):
    named, cu_seqlens = inputs(lengths)
    loss, grads = run(named, torch.tensor([0]) if not lengths else cu_seqlens, {"kind": kind, **EVERYTHING})
    assert [x.item() for x in (loss.total, *loss.metrics.values())] == [0] * (1 + len(loss.metrics))
    assert [None if grad is None else grad.tolist() for grad in grads] == [[], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_masked_tokens_is_all_zeros(kind):
    named, cu_seqlens = inputs([5, 1])
    named["weight_T"] = torch.zeros(6)
    loss, grads = run(named, cu_seqlens, {"kind": kind, **EVERYTHING})
    assert all(float(x) == 0 for x in loss.metrics.values())
    assert all(grad is not None and bool((grad == 0).all()) for grad in grads)


def test_inputs_may_be_strided_and_boundaries_int32():
    named, cu_seqlens = inputs([2, 129])
    strided = {name: torch.stack([x, x + 1], 1)[:, 0] for name, x in named.items()}
    one, grads = run(strided, cu_seqlens.int(), {"kind": "gspo", **EVERYTHING})
    other, other_grads = run(named, cu_seqlens, {"kind": "gspo", **EVERYTHING})
    assert torch.equal(one.total, other.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True) if a is not None and b is not None)


def test_float64_anywhere_is_computed_in_float64():
    named, cu_seqlens = inputs([5])
    named["advantage_T"] = named["advantage_T"].double()
    assert run(named, cu_seqlens, {"kind": "ppo"})[0].total.dtype == torch.float64


def test_nan_is_not_hidden_by_any_bound():
    for name in ("logprob_T", "old_logprob_T", "advantage_T", "ref_logprob_T", "sampler_logprob_T", "entropy_T"):
        named, cu_seqlens = inputs([3])
        named[name] = torch.tensor([1.0, float("nan"), 1.0])
        assert run(named, cu_seqlens, {"kind": "ppo", **EVERYTHING})[0].total.isnan(), name


def bits(result: tuple[Loss, list[Tensor | None]]) -> list[list[float] | None]:
    loss, grads = result
    return [None if x is None else x.tolist() for x in (loss.total, *loss.metrics.values(), *grads)]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_in_any_order_give_the_same_bits_as_two_runs_do(kind, in_any_order):
    named, cu_seqlens = inputs([3, 0, 129, 1, 77, BLOCK + 3])
    first, second = (bits(run(named, cu_seqlens, {"kind": kind, **EVERYTHING})) for _ in range(2))
    in_any_order()
    assert first == second == bits(run(named, cu_seqlens, {"kind": kind, **EVERYTHING}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_s_gradients_do_not_depend_on_its_batch(kind):
    named, cu_seqlens = inputs([7, 129, 40])
    _, grads = run(named, cu_seqlens, {"kind": kind, **EVERYTHING})
    alone = {name: x[7:136] for name, x in named.items()}
    _, own = run(alone, torch.tensor([0, 129]), {"kind": kind, **EVERYTHING})
    for whole, part in zip(grads, own, strict=True):
        assert whole is not None
        assert part is not None
        assert torch.equal(whole[7:136], part)


def test_effective_sample_size_is_the_same_from_the_kernel_s_metrics():
    named, cu_seqlens = inputs([3, 129])
    got, eager = (f(named, cu_seqlens, {"kind": "ppo", **EVERYTHING})[0].metrics for f in (run, eagerly))
    assert effective_sample_size(got) == pytest.approx(effective_sample_size(eager))


def test_forward_and_backward_are_one_launch():
    named, cu_seqlens = inputs([3, 4])
    with recorded(Target("cuda", 90)) as launches:
        run(named, cu_seqlens, {"kind": "gspo", **EVERYTHING})
    assert len(launches) == 1


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["ppo", "gspo", "reinforce"])
def test_a_masked_token_counts_nowhere_whatever_it_holds(monkeypatch: pytest.MonkeyPatch, kernels: str, kind: Any):
    monkeypatch.setenv("TEMPO_KERNELS", kernels)
    cu_seqlens, keep = torch.tensor([0, 3, 5]), torch.tensor([0, 2, 3])
    tensors = torch.randn(6, 5)
    tensors[:, [1, 4]] = torch.tensor([torch.nan, -torch.inf])
    weight_T = torch.tensor([0.2, 0.0, 0.3, 0.5, 0.0])

    def run(index: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[Loss, torch.Tensor]:
        logprob_T = tensors[0, index].clone().requires_grad_()
        old, advantage, reference, sampler, entropy = (x[index] for x in tensors[1:])
        loss = policy_loss(
            logprob_T, old, advantage, weight_T[index], cu_seqlens, kind=kind, entropy_T=entropy, entropy_coef=0.1,
            ref_logprob_T=reference, kl_coef=0.1, sampler_logprob_T=sampler, importance_cap=2.0,
        )  # fmt: skip
        loss.total.backward()
        assert logprob_T.grad is not None
        return loss, logprob_T.grad

    masked, gradient_T = run(torch.arange(5), cu_seqlens)
    alone, expected_T = run(keep, torch.tensor([0, 2, 3]))
    torch.testing.assert_close(masked.total, alone.total)
    torch.testing.assert_close(gradient_T[keep], expected_T)
    assert (gradient_T[[1, 4]] == 0).all()
    for name, value in alone.metrics.items():
        torch.testing.assert_close(masked.metrics[name], value, msg=name)


def test_a_nan_shows_in_the_maxima_too():
    one_T = torch.ones(3)
    loss = policy_loss(torch.tensor([0.0, torch.nan, 0.0]), one_T, one_T, one_T, torch.tensor([0, 3]), kind="ppo")
    assert all(loss.metrics[name].isnan() for name in MAXES)


def test_boundaries_beyond_the_tokens_touch_no_foreign_memory():
    one_T = torch.ones(4)
    how = Objective("ppo", 0.8, 1.2, math.inf, math.inf, "k3", 0.0, 0.0)
    given = Constants(one_T, one_T, one_T, None, None, torch.tensor([0, 3, 9]))
    long, _, _, _ = gradients_triton(one_T, None, given, how)
    short, _, _, _ = gradients_triton(one_T, None, given._replace(cu_seqlens_S1=torch.tensor([0, 3])), how)
    assert long.tolist() == [-1.0] * 4
    assert short.tolist() == [-1.0, -1.0, -1.0, 0.0]
