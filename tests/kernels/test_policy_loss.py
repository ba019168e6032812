"""Policy losses against numbers worked out by hand and against float64 loops over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_kernels import policy_loss, token_weights
from tempo_kernels.policy_loss import PolicyLossKind, effective_sample_size
from torch import Tensor
from torch.testing import assert_close

KINDS: list[PolicyLossKind] = ["ppo", "gspo", "reinforce"]
LENGTHS = [[1], [1, 0, 3], [0, 5, 0, 2], [33, 1, 64]]


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def one_token(ratio: float, advantage: float, **options) -> tuple[float, float, float]:
    """Loss, gradient in logprob and clip fraction of a single PPO token of weight 1 whose ratio is `ratio`."""
    logprob_T = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero_T, one_T = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = policy_loss(logprob_T, zero_T, advantage * one_T, one_T, torch.tensor([0, 1]), kind="ppo", **options)
    loss.total.backward()
    assert logprob_T.grad is not None
    return loss.total.item(), logprob_T.grad.item(), loss.metrics["actor/pg_clipfrac"].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 1.0, -1.0, -1.0, 0),
        (1.1, 1.0, -1.1, -1.1, 0),
        (1.5, 1.0, -1.2, 0.0, 1),  # right already far enough up
        (0.5, 1.0, -0.5, -0.5, 0),  # gone the wrong way: pulled back in full
        (1.0, -1.0, 1.0, 1.0, 0),
        (0.9, -1.0, 0.9, 0.9, 0),
        (0.5, -1.0, 0.8, 0.0, 1),  # wrong already far enough down
        (1.5, -1.0, 1.5, 1.5, 0),
        (1.5, -2.0, 3.0, 3.0, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_ppo_clips_only_the_side_that_has_gone_far_enough(ratio, advantage, loss, gradient, clipped):
    assert one_token(ratio, advantage) == pytest.approx((loss, gradient, clipped))


def test_the_two_clip_bounds_are_separate():
    assert one_token(1.5, 1.0, clip_low=0.1, clip_high=0.4)[0] == pytest.approx(-1.4)
    assert one_token(0.5, -1.0, clip_low=0.1, clip_high=0.4)[0] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -1.0, 3.0, 0.0),  # capped at 3 |A|
        (5.0, -2.0, 6.0, 0.0),
        (2.0, -1.0, 2.0, 2.0),  # below the cap
        (0.5, -1.0, 0.8, 0.0),  # the ordinary clip
        (5.0, 1.0, -1.2, 0.0),  # never for a positive advantage
        (0.1, 1.0, -0.1, -0.1),
    ],
)
def test_a_dual_clip_caps_the_loss_of_negative_advantages_only(ratio, advantage, loss, gradient):
    assert one_token(ratio, advantage, dual_clip=3.0)[:2] == pytest.approx((loss, gradient))


def test_a_lost_token_does_not_overflow_the_ratio():
    loss, gradient, _ = one_token(math.exp(500), -1.0)
    assert loss == pytest.approx(math.exp(10))
    assert math.isfinite(gradient)


def test_gspo_s_ratio_is_the_exponential_of_the_sequence_s_mean_log_ratio():
    # Log-ratios 0.2 and 0.0: the mean is 0.1 for both tokens; the third token is a sequence of its own.
    logprob_T = torch.tensor([0.2, 0.0, -0.05], dtype=torch.float64, requires_grad=True)
    advantage_T, weight_T = torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    zero_T = torch.zeros(3, dtype=torch.float64)
    loss = policy_loss(logprob_T, zero_T, advantage_T, weight_T, torch.tensor([0, 2, 3]), kind="gspo")
    loss.total.backward()
    first, second = math.exp(0.1), math.exp(-0.05)
    assert loss.total.item() == pytest.approx(-0.25 * first + 0.5 * first - 1.5 * second)
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == pytest.approx([-0.25 * first, 0.5 * first, -1.5 * second])


def test_gspo_clips_by_the_sequence_s_ratio_not_the_token_s():
    # The first token alone is far beyond the bound, the sequence's mean 0.1 is not beyond 0.2; then it is beyond 0.05.
    logprob_T, advantage_T = torch.tensor([1.0, -0.8]), torch.ones(2)
    cu_seqlens = torch.tensor([0, 2])
    inputs = (logprob_T, torch.zeros(2), advantage_T, torch.full((2,), 0.5), cu_seqlens)
    assert policy_loss(*inputs, kind="gspo", clip_high=0.2).metrics["actor/pg_clipfrac"] == 0
    assert policy_loss(*inputs, kind="gspo", clip_high=0.05).metrics["actor/pg_clipfrac"] == 1


def test_gspo_on_policy_clips_nothing_even_within_the_paper_s_narrow_bounds():
    logprob_T = torch.randn(5) - 2
    weight_T = token_weights(torch.tensor([0, 2, 5]), "sequence_mean")
    options = {"kind": "gspo", "clip_low": 3e-4, "clip_high": 5e-4}
    loss = policy_loss(logprob_T, logprob_T.clone(), torch.randn(5), weight_T, torch.tensor([0, 2, 5]), **options)
    assert loss.metrics["actor/pg_clipfrac"] == 0
    assert loss.metrics["actor/log_ratio_max"] == 0


def test_gspo_on_policy_has_ratio_1():
    logprob_T = torch.randn(5) - 2
    advantage_T, weight_T = torch.randn(5), torch.full((5,), 0.2)
    loss = policy_loss(logprob_T, logprob_T.clone(), advantage_T, weight_T, torch.tensor([0, 2, 5]), kind="gspo")
    assert_close(loss.total, -(advantage_T * weight_T).sum())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gspo_s_on_policy_gradient_is_length_normalised_reinforce(lengths: list[int]):
    logprob_T = (torch.randn(sum(lengths)) - 2).requires_grad_()
    advantage_T = torch.randn(sum(lengths))
    weight_T = token_weights(cu(lengths), "sequence_mean")
    loss = policy_loss(logprob_T, logprob_T.detach().clone(), advantage_T, weight_T, cu(lengths), kind="gspo")
    loss.total.backward()
    num_with_tokens = sum(length > 0 for length in lengths)
    want = [
        -a / (length * num_with_tokens)
        for i, length in enumerate(lengths)
        for a in advantage_T[cu(lengths)[i] : cu(lengths)[i + 1]].tolist()
    ]
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == pytest.approx(want, abs=1e-6)


def test_gspo_s_token_moves_no_other_token_of_its_sequence():
    logprob_T = torch.randn(4).requires_grad_()
    only_second_T = torch.tensor([0.0, 1.0, 0.0, 0.0])
    inputs = (logprob_T, torch.randn(4), only_second_T, torch.ones(4), torch.tensor([0, 4]))
    policy_loss(*inputs, kind="gspo", clip_low=0.99, clip_high=100.0).total.backward()
    assert logprob_T.grad is not None
    assert (logprob_T.grad != 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "kind",
    [
        "ppo",
        "gspo",
        "reinforce",
    ],
)
def test_no_gradient_flows_into_the_old_policy(kind: PolicyLossKind):
    logprob_T, old_logprob_T = torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()
    loss = policy_loss(logprob_T, old_logprob_T, torch.ones(3), torch.ones(3), torch.tensor([0, 1, 3]), kind=kind)
    assert torch.autograd.grad(loss.total, old_logprob_T, allow_unused=True)[0] is None


def test_reinforce_by_hand():
    logprob_T = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantage_T, weight_T = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0.5, 0.25, 0.25])
    loss = policy_loss(logprob_T, torch.zeros(3), advantage_T, weight_T, torch.tensor([0, 3]), kind="reinforce")
    loss.total.backward()
    assert loss.total.item() == pytest.approx(0.5 - 0.5 + 1.5)
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == [-0.5, 0.25, -0.5]


def definition(kind, logprob, old_logprob, advantage, weight, lengths, low, high, dual) -> tuple[float, list[float]]:
    """Loss and gradient in logprob, token by token, from the formulas."""
    total, gradient, start = 0.0, [], 0
    for length in lengths:
        tokens = range(start, start + length)
        mean = sum(logprob[t] - old_logprob[t] for t in tokens) / max(length, 1)
        for t in tokens:
            a, w = advantage[t], weight[t]
            if kind == "reinforce":
                total, slope = total - w * a * logprob[t], -a
            else:
                ratio = math.exp(mean if kind == "gspo" else logprob[t] - old_logprob[t])
                bounded = min(max(ratio, 1 - low), 1 + high)
                loss, slope = -a * ratio, -a * ratio
                if -a * bounded > loss:
                    loss, slope = -a * bounded, 0.0
                if dual is not None and a < 0 and loss > -a * dual:
                    loss, slope = -a * dual, 0.0
                total += w * loss
            gradient.append(w * slope)
        start += length
    return total, gradient


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_matches_its_definition_forward_and_backward(kind, lengths, dual_clip):
    generator = torch.Generator().manual_seed(len(lengths))
    old, noise, advantage_T, weight_T = torch.randn(4, sum(lengths), generator=generator, dtype=torch.float64)
    weight_T = weight_T.abs()
    logprob_T = (old + 0.6 * noise).requires_grad_()
    options = {"kind": kind, "clip_low": 0.15, "clip_high": 0.3, "dual_clip": dual_clip}
    loss = policy_loss(logprob_T, old, advantage_T, weight_T, cu(lengths), **options)
    loss.total.backward()
    lists = {"logprob": logprob_T.tolist(), "old_logprob": old.tolist(), "advantage": advantage_T.tolist()}
    total, gradient = definition(
        kind, **lists, weight=weight_T.tolist(), lengths=lengths, low=0.15, high=0.3, dual=dual_clip
    )
    assert loss.total.item() == pytest.approx(total)
    assert logprob_T.grad is not None
    assert logprob_T.grad.tolist() == pytest.approx(gradient)


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_gradients_match_finite_differences(kind: PolicyLossKind):
    logprob_T = torch.tensor([0.05, -0.1, 0.6, -0.7], dtype=torch.float64, requires_grad=True)
    advantage_T = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    weight_T, old_T = torch.full((4,), 0.25, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 4])
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old_T, advantage_T, weight_T, cu_seqlens, kind=kind).total, (logprob_T,)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_whole_sequences_add_up_to_the_minibatch(kind: PolicyLossKind):
    lengths = [3, 1, 0, 4]
    logprob_T, old_T, advantage_T = torch.randn(3, 8, dtype=torch.float64)
    weight_T = token_weights(cu(lengths), "sequence_mean").double()
    both = policy_loss(logprob_T, old_T, advantage_T, weight_T, cu(lengths), kind=kind)
    first = policy_loss(logprob_T[:4], old_T[:4], advantage_T[:4], weight_T[:4], cu([3, 1]), kind=kind)
    second = policy_loss(logprob_T[4:], old_T[4:], advantage_T[4:], weight_T[4:], cu([0, 4]), kind=kind)
    assert_close(first.total + second.total, both.total)
    for name in ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl"):
        assert_close(first.metrics[name] + second.metrics[name], both.metrics[name])


def test_metrics_are_means_under_the_weights():
    # Token ratios 1.5 (clipped, A > 0) and 1: the clipped token weighs a quarter.
    logprob_T = torch.tensor([math.log(1.5), 0.0], requires_grad=True)
    weight_T = torch.tensor([0.25, 0.75])
    loss = policy_loss(logprob_T, torch.zeros(2), torch.ones(2), weight_T, torch.tensor([0, 2]), kind="ppo")
    assert loss.metrics["actor/pg_loss"].item() == pytest.approx(-0.25 * 1.2 - 0.75)
    assert loss.metrics["actor/pg_clipfrac"].item() == 0.25
    assert loss.metrics["actor/ppo_kl"].item() == pytest.approx(-0.25 * math.log(1.5))
    assert loss.metrics["actor/log_ratio_max"].item() == pytest.approx(math.log(1.5))


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_carry_no_gradient(kind: PolicyLossKind):
    logprob_T = torch.randn(2).requires_grad_()
    loss = policy_loss(logprob_T, torch.zeros(2), torch.ones(2), torch.ones(2), torch.tensor([0, 2]), kind=kind)
    assert not any(metric.requires_grad for metric in loss.metrics.values())


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_tokens_loses_nothing(kind: PolicyLossKind, cu_seqlens: list[int]):
    empty = torch.zeros(0)
    loss = policy_loss(empty.requires_grad_(), empty, empty, empty, torch.tensor(cu_seqlens), kind=kind)
    loss.total.backward()
    assert loss.total == 0
    assert all(metric == 0 for metric in loss.metrics.values())


def test_clip_fractions_are_told_apart_by_their_bound():
    # Ratios 1.5, 0.5 and 5 with A > 0, A < 0 and A < 0: one token at each bound, and one at none.
    logprob_T = torch.tensor([1.5, 0.5, 5.0, 1.0]).log()
    advantage_T, weight_T = torch.tensor([1.0, -1, -1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    metrics = policy_loss(
        logprob_T, torch.zeros(4), advantage_T, weight_T, cu([4]), kind="ppo", dual_clip=3.0
    ).metrics  # fmt: skip
    assert metrics["actor/clipfrac_high"].item() == pytest.approx(0.1)
    assert metrics["actor/clipfrac_low"].item() == pytest.approx(0.2)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(0.3)
    assert metrics["actor/pg_clipfrac_lower"].item() == pytest.approx(0.3)
    assert metrics["actor/ratio_max"].item() == pytest.approx(5)


def one_kl(log_gap: float, **options) -> tuple[float, float, float]:
    """Loss, gradient and KL metric of a single token of weight 1 with log(reference / policy) = log_gap."""
    logprob_T = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    zero_T, one_T = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = policy_loss(
        logprob_T, logprob_T.detach(), zero_T, one_T, cu([1]), kind="ppo", ref_logprob_T=logprob_T.detach() + log_gap,
        **options,
    )  # fmt: skip
    loss.total.backward()
    assert logprob_T.grad is not None
    return loss.total.item(), logprob_T.grad.item(), loss.metrics["actor/kl_loss"].item()


def test_k1_is_the_log_ratio_and_its_slope_is_1_whatever_the_reference():
    assert one_kl(0.5, kl="k1", kl_coef=0.1) == pytest.approx((-0.05, 0.1, -0.5))
    assert one_kl(-2.0, kl="k1", kl_coef=0.1) == pytest.approx((0.2, 0.1, 2.0))


@pytest.mark.parametrize("log_gap", [0.5, 0.0, -2.0, -60.0])
def test_k3_is_never_negative_and_pulls_towards_the_reference(log_gap: float):
    k3 = math.exp(log_gap) - 1 - log_gap
    assert one_kl(log_gap, kl_coef=0.1) == pytest.approx((0.1 * k3, 0.1 * (1 - math.exp(log_gap)), k3))


def test_a_token_that_the_policy_lost_does_not_overflow_the_kl():
    total, gradient, kl = one_kl(500.0, kl_coef=1.0)
    assert (total, gradient) == (pytest.approx(math.exp(10) - 11), 0)
    assert kl == total


def test_k3_estimates_the_kl_without_bias():
    # Over a vocabulary of 5, weighted by the policy, both estimators have the KL as mean.
    policy_V, reference_V = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    want = (policy_V.exp() * (policy_V - reference_V)).sum()
    for kl in ("k1", "k3"):
        got = policy_loss(
            policy_V, policy_V, torch.zeros(5), policy_V.exp(), cu([5]), kind="ppo", ref_logprob_T=reference_V, kl=kl
        )
        assert_close(got.metrics["actor/kl_loss"], want)


def test_a_reference_without_a_coefficient_is_only_measured():
    logprob_T = torch.randn(4, requires_grad=True)
    inputs = (logprob_T, torch.randn(4), torch.randn(4), torch.ones(4), cu([4]))
    plain = policy_loss(*inputs, kind="ppo")
    measured = policy_loss(*inputs, kind="ppo", ref_logprob_T=torch.randn(4))
    assert torch.equal(plain.total, measured.total)
    assert "actor/kl_loss" not in plain.metrics
    assert measured.metrics["actor/kl_loss"] > 0


def test_the_entropy_bonus_lowers_the_loss_and_pulls_entropy_up():
    entropy_T = torch.tensor([1.0, 2.0], requires_grad=True)
    weight_T = torch.tensor([0.25, 0.75])
    zero_T = torch.zeros(2)
    loss = policy_loss(
        zero_T, zero_T, zero_T, weight_T, cu([2]), kind="ppo", entropy_T=entropy_T, entropy_coef=0.1
    )  # fmt: skip
    loss.total.backward()
    assert loss.total.item() == pytest.approx(-0.175)
    assert loss.metrics["actor/entropy"].item() == pytest.approx(1.75)
    assert_close(entropy_T.grad, -0.1 * weight_T)


def test_entropy_without_a_coefficient_is_only_measured():
    entropy_T, logprob_T = torch.rand(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = policy_loss(
        logprob_T, torch.zeros(2), torch.ones(2), torch.ones(2), cu([2]), kind="ppo", entropy_T=entropy_T
    )  # fmt: skip
    assert torch.autograd.grad(loss.total, entropy_T, allow_unused=True)[0] is None
    assert_close(loss.metrics["actor/entropy"], entropy_T.detach().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights_scale_the_policy_gradient_up_to_their_cap(kind: PolicyLossKind):
    # The old policy finds the tokens e^0.1 and e^2 times as likely as the sampler did: weights e^0.1, and 2, the cap.
    old_T, noise_T = torch.tensor([-1.0, -1.0]), torch.tensor([0.05, -0.05])
    sampler_T, weight_T = old_T - torch.tensor([0.1, 2.0]), torch.tensor([0.5, 0.5])
    c_T = torch.tensor([math.exp(0.1), 2.0])

    def gradient(weight_T: Tensor, **options):
        logprob_T = (old_T + noise_T).requires_grad_()
        loss = policy_loss(
            logprob_T, old_T, torch.tensor([1.0, -1.0]), weight_T, cu([1, 1]), kind=kind,
            ref_logprob_T=old_T, sampler_logprob_T=sampler_T, **options,
        )  # fmt: skip
        return torch.autograd.grad(loss.total, logprob_T)[0], loss.metrics

    weighed_T, metrics = gradient(weight_T, importance_cap=2.0)
    assert_close(weighed_T, gradient(c_T * weight_T)[0])
    assert_close(metrics["actor/kl_loss"], gradient(weight_T)[1]["actor/kl_loss"])
    assert metrics["actor/ess_ratio"].item() == pytest.approx((math.exp(0.1) + 2) / 2)


def test_importance_weights_carry_no_gradient():
    sampler_T = torch.zeros(2, requires_grad=True)
    zero_T = torch.zeros(2, requires_grad=True)
    loss = policy_loss(
        zero_T, torch.zeros(2), torch.ones(2), torch.ones(2), cu([2]), kind="ppo", sampler_logprob_T=sampler_T,
        importance_cap=2.0,
    )  # fmt: skip
    assert torch.autograd.grad(loss.total, sampler_T, allow_unused=True)[0] is None


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_effective_sample_size_is_the_share_of_tokens_that_count(scale: float):
    # Ratios 3, 1 and 1: (5/3)^2 / (11/3), whatever the weights add up to.
    logprob_T, weight_T = torch.tensor([3.0, 1, 1]).log(), torch.full((3,), scale / 3)
    metrics = policy_loss(logprob_T, torch.zeros(3), torch.ones(3), weight_T, cu([3]), kind="ppo").metrics
    assert effective_sample_size(metrics) == pytest.approx(25 / 33)


def test_effective_sample_size_of_equal_weights_is_1_and_of_nothing_nan():
    one_T = torch.ones(3)
    assert effective_sample_size(policy_loss(one_T, one_T, one_T, one_T, cu([3]), kind="ppo").metrics) == 1
    empty = torch.zeros(0)
    assert math.isnan(
        effective_sample_size(policy_loss(empty, empty, empty, empty, cu([]), kind="ppo").metrics)
    )  # fmt: skip


def test_effective_sample_size_may_be_formed_after_micro_batches_are_added_up():
    logprob_T, old_T, advantage_T, weight_T = (*torch.randn(3, 6).double(), torch.rand(6).double())
    whole = policy_loss(logprob_T, old_T, advantage_T, weight_T, cu([6]), kind="ppo").metrics
    parts = [
        policy_loss(logprob_T[i], old_T[i], advantage_T[i], weight_T[i], cu([3]), kind="ppo").metrics
        for i in (slice(3), slice(3, 6))
    ]
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert effective_sample_size(summed) == pytest.approx(effective_sample_size(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype):
    x_4T = torch.randn(4, 5).to(dtype)
    half_T = x_4T[0].clone().requires_grad_()
    half = policy_loss(half_T, x_4T[1], x_4T[2], x_4T[3], cu([5]), kind="ppo")
    half.total.backward()
    x_4T = x_4T.float()
    wide = policy_loss(x_4T[0], x_4T[1], x_4T[2], x_4T[3], cu([5]), kind="ppo")
    assert torch.equal(half.total, wide.total)
    assert half_T.grad is not None
    assert half_T.grad.dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "k2"}, "k1 or k3, got 'k2'"),
        ({"kl_coef": 0.1}, "want ref_logprob for a coefficient of 0.1"),
        ({"entropy_coef": 0.1}, "want entropy for a coefficient of 0.1"),
        ({"importance_cap": 2.0}, "want sampler_logprob for an importance_cap of 2.0"),
        ({"importance_cap": 0.0, "sampler_logprob_T": torch.ones(1)}, "importance_cap must be positive, got 0.0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"clip_low": -0.1}, "must not be negative"),
        ({"entropy_T": torch.ones(2)}, r"entropy must be vectors with one entry per response token \(1\).* 2$"),
    ],
)
def test_options_that_make_no_sense_are_answered(options, message: str):
    one = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        policy_loss(one, one, one, one, cu([1]), kind="ppo", **options)


def test_an_unknown_kind_is_answered_with_the_choices():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="ppo, gspo or reinforce, got 'trpo'"):
        policy_loss(one, one, one, one, torch.tensor([0, 1]), kind="trpo")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", range(4))
def test_tensors_of_different_lengths_are_answered_with_all_lengths(wrong: int):
    a, b, c, d = (torch.ones(2 if i == wrong else 3) for i in range(4))
    with pytest.raises(ValueError, match=r"one entry per response token \(3\)") as error:
        policy_loss(a, b, c, d, torch.tensor([0, 3]), kind="ppo")
    assert f"got {len(a)}, {len(b)}, {len(c)}, {len(d)}" in str(error.value)


def test_token_mean_weighs_every_token_alike():
    assert token_weights(cu([1, 0, 3]), "token_mean").tolist() == [0.25] * 4


def test_sequence_mean_weighs_every_sequence_that_has_tokens_alike():
    assert token_weights(cu([1, 0, 3]), "sequence_mean").tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any), st.sampled_from(["token_mean", "sequence_mean"])
)
@settings(deadline=None)
def test_token_weights_add_up_to_1(lengths: list[int], aggregate):
    weight_T = token_weights(cu(lengths), aggregate)
    assert len(weight_T) == sum(lengths)
    assert float(weight_T.double().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_without_tokens_there_are_no_weights(aggregate):
    assert token_weights(cu([0, 0]), aggregate).tolist() == []


def test_a_fixed_denominator_weighs_a_token_alike_whatever_the_lengths():
    assert token_weights(cu([1, 0, 3]), "fixed_denominator", denominator=10).tolist() == pytest.approx([1 / 20] * 4)
    assert token_weights(cu([7, 9]), "fixed_denominator", denominator=10).tolist() == pytest.approx([1 / 20] * 16)
    assert token_weights(cu([0, 0]), "fixed_denominator", denominator=10).tolist() == []


@pytest.mark.parametrize(
    ("aggregate", "denominator"), [("fixed_denominator", None), ("fixed_denominator", 0.0), ("token_mean", 3.0)]
)
def test_a_denominator_belongs_to_fixed_denominator(aggregate, denominator):
    with pytest.raises(ValueError, match=f"positive denominator .* got {denominator} for {aggregate}"):
        token_weights(cu([1]), aggregate, denominator=denominator)


def test_an_unknown_aggregate_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="token_mean, sequence_mean or fixed_denominator, got 'sum'"):
        token_weights(cu([1]), "sum")  # pyright: ignore[reportArgumentType]
