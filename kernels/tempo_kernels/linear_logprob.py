"""Log-probabilities of chosen tokens straight from hidden states: LM head, log-softmax and gather in one op.

With logits z_t = cap(h_t W^T + b) / temperature, where cap(z) = c tanh(z / c) when a softcap c is given,

    logsumexp_t = log sum_v exp z_tv
    logprob_t   = z_t[y_t] - logsumexp_t
    entropy_t   = logsumexp_t - sum_v softmax(z_t)_v z_tv

The [T, V] logits never exist beyond a byte budget: rows are taken in chunks, and a chunk's logits are computed again in the
backward pass.
"""

# Shape letters: T = packed response tokens, D = hidden size, V = vocabulary
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEFAULT_MAX_BYTES = 64 * 2**20


class TokenStats(NamedTuple):
    """What the LM head says of each packed token; float32 [T], except `is_top1_T`, which is bool."""

    logprob_T: Tensor
    entropy_T: Tensor
    logsumexp_T: Tensor
    is_top1_T: Tensor


def linear_logprob_reference(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """The definition, with all logits at once: product in the dtype of hidden, the rest in float32 (float64 for float64)."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = (hidden_TD @ head_VD.to(hidden_TD.dtype).T).to(dtype)
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.to(dtype)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    logsumexp_T = logits_TV.logsumexp(-1)
    logprob_T = logits_TV.gather(-1, target_T[:, None])[:, 0] - logsumexp_T
    probability_TV = (logits_TV - logsumexp_T[:, None]).exp()
    entropy_T = logsumexp_T - (probability_TV * logits_TV).sum(-1)
    return TokenStats(logprob_T, entropy_T, logsumexp_T, logits_TV.argmax(-1) == target_T)


def linear_logprob(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> TokenStats:
    """Same as `log_softmax(hidden_TD @ head_VD.T / temperature)[arange(T), target_T]`, plus entropy, logsumexp and whether the
    target was the most likely token, while at most `max_bytes` of logits exist at a time.

    Args:
        hidden_TD: hidden states of the positions that predict the targets, any float dtype.
        head_VD: LM head weight. target_T: token ids, int64.

    Raises:
        ValueError: shapes that do not fit, a temperature or softcap that is not positive.
    """
    if hidden_TD.ndim != 2 or head_VD.ndim != 2 or hidden_TD.shape[1] != head_VD.shape[1]:
        raise ValueError(f"want hidden [T, D] and head [V, D], got {tuple(hidden_TD.shape)} and {tuple(head_VD.shape)}")
    if target_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"want one target per row of hidden ({len(hidden_TD)}), got shape {tuple(target_T.shape)}")
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"temperature and softcap must be positive, got {temperature} and {softcap}")
    rows = max(1, max_bytes // (4 * len(head_VD)))
    if len(hidden_TD) <= rows:
        return linear_logprob_reference(hidden_TD, head_VD, target_T, bias_V, temperature, softcap)
    chunks = [
        checkpoint(linear_logprob_reference, hidden, head_VD, target, bias_V, temperature, softcap, use_reentrant=False)
        for hidden, target in zip(hidden_TD.split(rows), target_T.split(rows), strict=True)
    ]
    return TokenStats(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))  # pyright: ignore[reportArgumentType]
