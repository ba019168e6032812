"""Policy objectives on packed tokens: PPO's clipped token ratio, GSPO's clipped sequence ratio, REINFORCE.

With l_t = log pi(y_t) - log pi_old(y_t), the ratio rho_t, and sg[] for what is constant in the gradient,

    PPO        rho_t = exp(l_t)                                              (arXiv 1707.06347, eq. 7)
    GSPO       rho_t = exp(sg[mean_t l_t] + log pi(y_t) - sg[log pi(y_t)])    (arXiv 2507.18071, eq. 14)
    pg_t     = max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high))
    REINFORCE  pg_t = -A_t log pi(y_t)

where, with a dual clip c > 1 (arXiv 1912.09729, eq. 5), tokens with A_t < 0 lose at most -A_t c. That maximum is the same as
-A_t rho_t with rho_t held at a bound, without gradient: at 1 - low or c where A_t < 0, at 1 + high where A_t > 0. Then

    total = sum_t w_t (c_t pg_t + kl_coef kl_t - entropy_coef H_t)
    c_t   = sg[min(pi_old(y_t) / pi_sampler(y_t), cap)]     truncated importance sampling: the sampler's numerics are not the
                                                            trainer's (Yao et al. 2025, "Your efficient RL framework secretly
                                                            brings you off-policy RL training", fengyao.notion.site/off-policy-rl)
    k1_t  = log pi(y_t) - log pi_ref(y_t)                   estimators of KL(pi || reference)
    k3_t  = exp(-k1_t) - 1 + k1_t                           (Schulman 2020, joschu.net/blog/kl-approx.html)

The caller chooses the weights w_t once, over the whole minibatch, so micro-batches only add up.
"""

# Shape letters: T = packed response tokens, S = sequences
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.dispatch import use_triton
from tempo_kernels.policy_loss_triton import (
    MAX_LOG_RATIO,
    MAXES,
    SUMS,
    Constants,
    KLKind,
    Objective,
    PolicyLossKind,
    gradients_triton,
)
from tempo_kernels.segments import segment_ids, segment_lengths, segment_sum


class Loss(NamedTuple):
    """A scalar to call backward on, and what the op knows. Metrics are detached and add up over micro-batches, except those
    ending in `_max`, of which the largest counts."""

    total: Tensor
    metrics: dict[str, Tensor]


def _policy_loss_torch(logprob_T: Tensor, entropy_T: Tensor | None, given: Constants, how: Objective) -> Loss:
    """The definition, in the inputs' precision, at least float32; autograd derives the gradient."""
    weight_T, is_live_T, cu_seqlens_S1 = _wide(given.weight_T), given.weight_T != 0, given.cu_seqlens_S1
    has_masked = weight_T.is_cuda or not is_live_T.all()

    def live(x_T: Tensor) -> Tensor:
        """What a masked token holds must not count, not even as 0 * NaN."""
        return torch.where(is_live_T, _wide(x_T), 0.0) if has_masked else _wide(x_T)

    logprob_T, old_logprob_T, advantage_T = (live(x) for x in (logprob_T, given.old_logprob_T, given.advantage_T))
    log_ratio_T = logprob_T - old_logprob_T
    if how.kind == "gspo":
        num_live_S = segment_sum(is_live_T.to(log_ratio_T.dtype), cu_seqlens_S1).clamp(min=1)
        mean_T = (segment_sum(log_ratio_T.detach(), cu_seqlens_S1) / num_live_S)[segment_ids(cu_seqlens_S1)]
        log_ratio_T = live(mean_T) + (logprob_T - logprob_T.detach())
    ratio_T = log_ratio_T.clamp(max=MAX_LOG_RATIO).exp()
    is_low_T = (advantage_T < 0) & (ratio_T < how.lowest_ratio)
    is_high_T = (advantage_T > 0) & (ratio_T > how.highest_ratio)
    is_dual_T = (advantage_T < 0) & (ratio_T > how.dual_clip)
    if how.kind == "reinforce":
        pg_T = -advantage_T * logprob_T
    else:
        held_T = ratio_T.masked_fill(is_low_T, how.lowest_ratio).masked_fill(is_high_T, how.highest_ratio)
        if how.dual_clip < math.inf:
            held_T = held_T.masked_fill(is_dual_T, how.dual_clip)
        pg_T = -advantage_T * held_T
    effective_T = ratio_T.detach()
    if given.sampler_logprob_T is not None:
        effective_T = (old_logprob_T - live(given.sampler_logprob_T)).exp().clamp(max=how.importance_cap)
        pg_T = effective_T * pg_T
    per_token = {
        "actor/pg_loss": pg_T,
        "actor/pg_clipfrac": is_low_T | is_high_T,
        "actor/clipfrac_low": is_low_T,
        "actor/clipfrac_high": is_high_T,
        "actor/pg_clipfrac_lower": is_dual_T,
        "actor/ppo_kl": old_logprob_T - logprob_T,
    }
    total_T = pg_T
    if given.ref_logprob_T is not None:
        kl_T = logprob_T - live(given.ref_logprob_T)
        if how.kl == "k3":
            gap_T = (-kl_T).clamp(max=MAX_LOG_RATIO)
            kl_T = gap_T.exp() - 1 - gap_T
        per_token["actor/kl_loss"] = kl_T
        total_T = total_T + how.kl_coef * kl_T if how.kl_coef else total_T
    if entropy_T is not None:
        per_token["actor/entropy"] = live(entropy_T)
        total_T = total_T - how.entropy_coef * live(entropy_T) if how.entropy_coef else total_T
    per_token |= {
        "actor/ess_weight": torch.ones_like(weight_T),
        "actor/ess_ratio": effective_T,
        "actor/ess_ratio_squared": effective_T**2,
    }
    with torch.no_grad():
        metrics = {name: (weight_T * x_T).sum() for name, x_T in per_token.items()}
        metrics["actor/log_ratio_max"] = log_ratio_T.abs().max() if len(log_ratio_T) else weight_T.new_zeros(())
        metrics["actor/ratio_max"] = live(ratio_T).max() if len(ratio_T) else weight_T.new_zeros(())
    return Loss((weight_T * total_T).sum(), metrics)


def _wide(x_T: Tensor) -> Tensor:
    return x_T.to(torch.promote_types(x_T.dtype, torch.float32))


class _PolicyLoss(torch.autograd.Function):
    """The kernel: it writes both gradients in the forward pass, and the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, logprob_T: Tensor, entropy_T: Tensor | None, given: Constants, how: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_logprob_T, d_entropy_T, sums, largest = gradients_triton(logprob_T, entropy_T, given, how)
        ctx.save_for_backward(d_logprob_T, d_entropy_T)
        ctx.dtypes = logprob_T.dtype, None if entropy_T is None else entropy_T.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums, largest)
        return sums[0].clone(), sums, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        upstream = grads[0]
        d_inputs = (
            None if d_T is None or upstream is None else (upstream * d_T).to(dtype)
            for d_T, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*d_inputs, None, None)


def _policy_loss_triton(logprob_T: Tensor, entropy_T: Tensor | None, given: Constants, how: Objective) -> Loss:
    given = Constants(*(None if x is None else x.contiguous() for x in given))  # pyright: ignore[reportArgumentType]
    total, sums, largest = _PolicyLoss.apply(
        logprob_T.contiguous(), None if entropy_T is None else entropy_T.contiguous(), given, how
    )
    metrics: dict[str, Tensor] = dict(zip(SUMS[1:] + MAXES, [*sums.unbind()[1:], *largest.unbind()], strict=True))
    if given.ref_logprob_T is None:
        del metrics["actor/kl_loss"]
    if entropy_T is None:
        del metrics["actor/entropy"]
    return Loss(total, metrics)


def policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    kind: PolicyLossKind,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_T: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KLKind = "k3",
    sampler_logprob_T: Tensor | None = None,
    importance_cap: float | None = None,
) -> Loss:
    """sum_t w_t (c_t pg_t + kl_coef kl_t - entropy_coef H_t) of the formulas above, with gradient through `logprob_T` and
    `entropy_T` only. One Triton kernel runs it on a GPU, PyTorch elsewhere (see `tempo_kernels.dispatch`).

    Args:
        logprob_T: log-probabilities under the policy being improved; any float dtype, read as at least float32.
        old_logprob_T: the same tokens under the policy that is the ratio's denominator.
        advantage_T: A_t, constant.
        weight_T: w_t, see `token_weights`; metrics are means under these weights. A token of weight 0 is masked: it is in no sum,
            maximum or mean, whatever its log-probs hold.
        cu_seqlens_S1: boundaries of the responses; GSPO's ratio is a mean over each.
        clip_low, clip_high, dual_clip: bounds of the ratio; REINFORCE has none.
        entropy_T: H_t. Without entropy_coef it is a metric only.
        ref_logprob_T: the same tokens under the reference. Without kl_coef the KL is a metric only.
        kl: the estimator, differentiated as it stands. k1's slope in log pi is 1 whatever the reference, which on average pulls
            nowhere: it measures. k3's is 1 - pi_ref / pi, which pulls towards the reference (on policy, along the gradient of
            KL(reference || pi): Tang and Munos 2025, arXiv 2506.09477). A token whose log(pi_ref / pi) is beyond MAX_LOG_RATIO
            counts as if it were there, without gradient.
        sampler_logprob_T, importance_cap: both of them turn c_t on; without the cap c_t = 1.

    Metrics, all sums under w_t except the two maxima:
        actor/pg_loss                           c_t pg_t
        actor/clipfrac_low, _high               tokens held at 1 - low and at 1 + high; together actor/pg_clipfrac
        actor/pg_clipfrac_lower                 tokens held at the dual clip
        actor/ppo_kl                            log pi_old - log pi
        actor/kl_loss, actor/entropy            kl_t and H_t, when they are given
        actor/ess_weight, _ratio, _ratio_squared    1, r_t and r_t^2 for `effective_sample_size`; r_t is c_t or else rho_t
        actor/log_ratio_max, actor/ratio_max    of |log rho_t| and of rho_t

    Raises:
        ValueError: unknown kind, tensors of different lengths, bounds or coefficients that make no sense.
    """
    _check_options(kind, kl, clip_low, clip_high, dual_clip, importance_cap)
    for name, x, coefficient in (("entropy", entropy_T, entropy_coef), ("ref_logprob", ref_logprob_T, kl_coef)):
        if x is None and coefficient:
            raise ValueError(f"want {name} for a coefficient of {coefficient}, got None")
    if importance_cap is not None and sampler_logprob_T is None:
        raise ValueError(f"want sampler_logprob for an importance_cap of {importance_cap}, got None")
    has_bounds = kind != "reinforce"
    how = Objective(
        kind,
        lowest_ratio=1.0 - clip_low if has_bounds else -math.inf,
        highest_ratio=1.0 + clip_high if has_bounds else math.inf,
        dual_clip=float(dual_clip) if has_bounds and dual_clip is not None else math.inf,
        importance_cap=math.inf if importance_cap is None else float(importance_cap),
        kl=kl,
        kl_coef=float(kl_coef),
        entropy_coef=float(entropy_coef),
    )
    given = Constants(
        old_logprob_T.detach(),
        advantage_T.detach(),
        weight_T.detach(),
        None if ref_logprob_T is None else ref_logprob_T.detach(),
        None if sampler_logprob_T is None or importance_cap is None else sampler_logprob_T.detach(),
        cu_seqlens_S1,
    )
    if entropy_T is not None and not entropy_coef:
        entropy_T = entropy_T.detach()  # or zeros would flow back through the whole head
    _check_tensors(logprob_T, entropy_T, given)
    floats = [x for x in (logprob_T, entropy_T, *given[:-1]) if x is not None]
    run = _policy_loss_triton if all(use_triton(x) for x in floats) else _policy_loss_torch
    return run(logprob_T, entropy_T, given, how)


def _check_options(
    kind: str, kl: str, clip_low: float, clip_high: float, dual_clip: float | None, importance_cap: float | None
) -> None:
    if kind not in ("ppo", "gspo", "reinforce"):
        raise ValueError(f"policy loss must be ppo, gspo or reinforce, got {kind!r}")
    if kl not in ("k1", "k3"):
        raise ValueError(f"kl must be k1 or k3, got {kl!r}")
    if clip_low < 0 or clip_high < 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(
            f"clip_low and clip_high must not be negative and dual_clip must be above 1, got {clip_low}, {clip_high} "
            f"and {dual_clip}"
        )
    if importance_cap is not None and importance_cap <= 0:
        raise ValueError(f"importance_cap must be positive, got {importance_cap}")


def _check_tensors(logprob_T: Tensor, entropy_T: Tensor | None, given: Constants) -> None:
    names = ("logprob", "old_logprob", "advantage", "weight", "ref_logprob", "sampler_logprob", "entropy")
    *constants, cu_seqlens_S1 = given
    tensors = {k: x for k, x in zip(names, (logprob_T, *constants, entropy_T), strict=True) if x is not None}
    devices = {x.device for x in (*tensors.values(), cu_seqlens_S1)}
    if len(devices) > 1:
        raise ValueError(f"want all tensors on one device, got {sorted(map(str, devices))}")
    shapes = {x.shape for x in tensors.values()}
    if not cu_seqlens_S1.is_cuda:  # looking on a GPU would make the host wait
        segment_lengths(cu_seqlens_S1)
        shapes.add(torch.Size([int(cu_seqlens_S1[-1])]))
    if len(shapes) > 1 or logprob_T.ndim != 1:
        raise ValueError(
            f"{', '.join(tensors)} must be vectors with one entry per response token ({int(cu_seqlens_S1[-1])}), "
            f"got {', '.join(str(x.shape[0] if x.ndim == 1 else tuple(x.shape)) for x in tensors.values())}"
        )


def effective_sample_size(metrics: Mapping[str, Tensor | float]) -> float:
    """The share of the tokens that would carry as much information if none were over-weighted, in (0, 1]:
    (sum_t w_t r_t)^2 / (sum_t w_t sum_t w_t r_t^2), from `policy_loss`'s metrics, added up or averaged over steps.

    With equal weights that sum to 1 it is (sum r)^2 / sum r^2 of T tokens, divided by T (Kong 1992). NaN without tokens.
    """
    weight, ratio, squared = (float(metrics[f"actor/ess_{name}"]) for name in ("weight", "ratio", "ratio_squared"))
    return ratio**2 / (weight * squared) if weight * squared else math.nan


def token_weights(
    cu_seqlens_S1: Tensor,
    aggregate: Literal["token_mean", "sequence_mean", "fixed_denominator"],
    *,
    denominator: float | None = None,
) -> Tensor:
    """w_t of one minibatch, [T] float32, where S counts the sequences that have tokens.

    token_mean: 1 / T for every token. sequence_mean: 1 / (S T_i), the mean over sequences of their token means. Both sum to 1.
    fixed_denominator: 1 / (S denominator) with one constant for all minibatches, such as the longest response allowed: neither
    a sequence's length nor its neighbours' change what a token weighs (Dr. GRPO, arXiv 2503.20783). The sum is the mean length
    over the denominator, and so metrics are means under these weights times that.

    Raises:
        ValueError: unknown aggregate; no positive denominator for fixed_denominator, or one for another aggregate.
    """
    length_S = segment_lengths(cu_seqlens_S1)
    num_with_tokens = (length_S > 0).sum().clamp(min=1)
    if aggregate not in ("token_mean", "sequence_mean", "fixed_denominator"):
        raise ValueError(f"aggregate must be token_mean, sequence_mean or fixed_denominator, got {aggregate!r}")
    if (aggregate == "fixed_denominator") != (denominator is not None and denominator > 0):
        raise ValueError(f"want a positive denominator for fixed_denominator only, got {denominator} for {aggregate}")
    if aggregate == "sequence_mean":
        weight_S = 1.0 / (length_S.clamp(min=1) * num_with_tokens).float()
    else:
        total = length_S.sum().clamp(min=1) if denominator is None else num_with_tokens * denominator
        weight_S = (1.0 / total.float()).expand(len(length_S))
    return weight_S.repeat_interleave(length_S)
