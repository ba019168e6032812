"""Policy objectives on packed tokens: PPO's clipped token ratio, GSPO's clipped sequence ratio, REINFORCE.

With l_t = log pi(y_t) - log pi_old(y_t) and the ratio rho_t,

    PPO        rho_t = exp(l_t)                                              (arXiv 1707.06347, eq. 7)
    GSPO       rho_t = exp(sg[mean_t l_t] + log pi(y_t) - sg[log pi(y_t)])    (arXiv 2507.18071, eq. 14)
    loss_t   = max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high))
    REINFORCE  loss_t = -A_t log pi(y_t)

and, with a dual clip c > 1 (arXiv 1912.09729, eq. 5), tokens with A_t < 0 lose at most -A_t c. The loss is sum_t w_t loss_t:
the caller chooses the weights w_t once, over the whole minibatch, so micro-batches only add up.
"""

# Shape letters: T = packed response tokens, S = sequences
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tempo_kernels.segments import segment_ids, segment_lengths, segment_mean

PolicyLossKind = Literal["ppo", "gspo", "reinforce"]

# exp(10) is far beyond every clip bound; the cap only keeps a lost token from overflowing the ratio.
MAX_LOG_RATIO = 10.0


class Loss(NamedTuple):
    """A scalar to call backward on, and what the op knows. Metrics are detached and add up over micro-batches,
    except those ending in `_max`, of which the largest counts."""

    total: Tensor
    metrics: dict[str, Tensor]


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
) -> Loss:
    """sum_t w_t loss_t of the objectives above, with gradient through `logprob_T` only.

    Args:
        logprob_T: log-probabilities under the policy being improved, float32.
        old_logprob_T: the same tokens under the policy that is the ratio's denominator.
        advantage_T: A_t, constant.
        weight_T: w_t, see `token_weights`; metrics are means under these weights.
        cu_seqlens_S1: boundaries of the responses; GSPO's ratio is a mean over each.

    Raises:
        ValueError: unknown kind, or tensors of different lengths.
    """
    if not len(logprob_T) == len(old_logprob_T) == len(advantage_T) == len(weight_T) == int(cu_seqlens_S1[-1]):
        raise ValueError(
            "logprob, old_logprob, advantage and weight must have one entry per response token "
            f"({int(cu_seqlens_S1[-1])}), got {len(logprob_T)}, {len(old_logprob_T)}, {len(advantage_T)}, {len(weight_T)}"
        )
    old_logprob_T, advantage_T = old_logprob_T.detach(), advantage_T.detach()
    log_ratio_T = logprob_T - old_logprob_T
    if kind == "reinforce":
        loss_T = -advantage_T * logprob_T
        is_clipped_T = torch.zeros_like(loss_T, dtype=torch.bool)
    elif kind in ("ppo", "gspo"):
        if kind == "gspo":
            mean_T = segment_mean(log_ratio_T.detach(), cu_seqlens_S1)[segment_ids(cu_seqlens_S1)]
            log_ratio_T = mean_T + logprob_T - logprob_T.detach()
        ratio_T = log_ratio_T.clamp(max=MAX_LOG_RATIO).exp()
        plain_T = -advantage_T * ratio_T
        clipped_T = -advantage_T * ratio_T.clamp(1 - clip_low, 1 + clip_high)
        is_clipped_T = clipped_T > plain_T
        loss_T = torch.maximum(plain_T, clipped_T)
        if dual_clip is not None:
            loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -advantage_T * dual_clip), loss_T)
    else:
        raise ValueError(f"policy loss must be ppo, gspo or reinforce, got {kind!r}")
    with torch.no_grad():
        metrics = {
            "actor/pg_loss": (weight_T * loss_T).sum(),
            "actor/pg_clipfrac": (weight_T * is_clipped_T).sum(),
            "actor/ppo_kl": (weight_T * (old_logprob_T - logprob_T)).sum(),
            "actor/log_ratio_max": log_ratio_T.abs().max() if len(loss_T) else loss_T.new_zeros(()),
        }
    return Loss((weight_T * loss_T).sum(), metrics)


def token_weights(cu_seqlens_S1: Tensor, aggregate: Literal["token_mean", "sequence_mean"]) -> Tensor:
    """w_t of one minibatch, [T] float32, summing to 1.

    token_mean: 1 / T for every token. sequence_mean: 1 / (S T_i), the mean over sequences of their token means, where S counts
    the sequences that have tokens.
    """
    length_S = segment_lengths(cu_seqlens_S1)
    if aggregate == "token_mean":
        weight_S = torch.full_like(length_S, 1, dtype=torch.float32) / max(int(length_S.sum()), 1)
    elif aggregate == "sequence_mean":
        weight_S = 1.0 / (length_S.clamp(min=1) * max(int((length_S > 0).sum()), 1)).float()
    else:
        raise ValueError(f"aggregate must be token_mean or sequence_mean, got {aggregate!r}")
    return weight_S.repeat_interleave(length_S)
