"""How far apart sampler and trainer are: the same tokens under the same weights, by two programs."""

import torch
from tempo_kernels.segments import segment_sum
from torch import Tensor


def mismatch(
    sampler_logprob_T: Tensor, trainer_logprob_T: Tensor, cu_responses_S1: Tensor, *, band: float
) -> dict[str, float]:
    """Statistics of d = trainer - sampler log-prob of each sampled token, by metric name.

    `mismatch_kl` is the k3 estimate of KL(sampler || trainer), mean(exp(d) - 1 - d) (Schulman 2020). The effective sample sizes are
    (sum w)^2 / (n sum w^2) of the weights that would correct for it: exp(d) of tokens, exp(sum of d) of sequences; 1 is perfect.
    `outside_band` is the share of tokens with |d| > `band`. For d = (0, 0.1): mean |d| 0.05, kl (e^0.1 - 1.1) / 2.
    """
    d_T = (trainer_logprob_T - sampler_logprob_T).double()
    return {
        "rollout/logprob_diff_mean": float(d_T.abs().mean()),
        "rollout/logprob_diff_max": float(d_T.abs().max()),
        "rollout/mismatch_kl": float((torch.expm1(d_T) - d_T).mean()),
        "rollout/ess_token": _effective_share(d_T),
        "rollout/ess_sequence": _effective_share(segment_sum(d_T, cu_responses_S1)),
        "rollout/outside_band": float((d_T.abs() > band).double().mean()),
    }


def _effective_share(log_weight: Tensor) -> float:
    weight = (log_weight - log_weight.max()).exp()
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))
