"""Tensor ops of test-time training. One op, one file; the names below are the public ones."""

from tempo_kernels.advantage import advantage, group_advantage, split_values, whiten
from tempo_kernels.linear_logprob import TokenStats, linear_logprob
from tempo_kernels.logprob import gather_logprob
from tempo_kernels.policy_loss import Loss, policy_loss, token_weights
from tempo_kernels.value_head import ValueLoss, value_head, value_head_loss, value_loss, value_of, value_score

__all__ = [
    "Loss",
    "TokenStats",
    "ValueLoss",
    "advantage",
    "gather_logprob",
    "group_advantage",
    "linear_logprob",
    "policy_loss",
    "split_values",
    "token_weights",
    "value_head",
    "value_head_loss",
    "value_loss",
    "value_of",
    "value_score",
    "whiten",
]
