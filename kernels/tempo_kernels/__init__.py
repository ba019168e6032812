"""Tensor ops of test-time training. One op, one file; the names below are the public ones."""

from tempo_kernels.advantage import (
    Moments,
    advantage,
    explained_variance,
    group_advantage,
    merge_moments,
    moments,
    returns,
    split_values,
    whiten,
    whitened_advantage,
)
from tempo_kernels.linear_logprob import TokenStats, linear_logprob
from tempo_kernels.logprob import gather_logprob
from tempo_kernels.policy_loss import Loss, effective_sample_size, policy_loss, token_weights
from tempo_kernels.value_head import ValueLoss, value_head, value_head_loss, value_loss, value_of, value_score

__all__ = [
    "Loss",
    "Moments",
    "TokenStats",
    "ValueLoss",
    "advantage",
    "effective_sample_size",
    "explained_variance",
    "gather_logprob",
    "group_advantage",
    "linear_logprob",
    "merge_moments",
    "moments",
    "policy_loss",
    "returns",
    "split_values",
    "token_weights",
    "value_head",
    "value_head_loss",
    "value_loss",
    "value_of",
    "value_score",
    "whiten",
    "whitened_advantage",
]
