"""Tensor ops of test-time training. One op, one file; the names below are the public ones."""

from tempo_kernels.advantage import advantage, group_advantage, split_values, whiten
from tempo_kernels.linear_logprob import TokenStats, linear_logprob
from tempo_kernels.policy_loss import Loss, policy_loss, token_weights
from tempo_kernels.value_head import value_loss, value_of, value_score

__all__ = [
    "Loss",
    "TokenStats",
    "advantage",
    "group_advantage",
    "linear_logprob",
    "policy_loss",
    "split_values",
    "token_weights",
    "value_loss",
    "value_of",
    "value_score",
    "whiten",
]
