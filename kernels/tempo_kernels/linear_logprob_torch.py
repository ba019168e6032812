"""`linear_logprob` in PyTorch: its definition, and the two passes over blocks of logits that run on a CPU.

An eager operation reads and writes its whole tensor, so seven of them over float32 logits would cost more than the matrix
product. Here they take ROWS x COLUMNS at a time, in scratch memory that stays in the processor's cache.
"""

# Shape letters: T = packed response tokens, D = hidden size, V = vocabulary, R = rows of a block, C = its columns
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tempo_kernels.jit_math import LN_2, LOG2_E, MASKED_LOGIT

# 2 MB of float32 scratch: large enough to hide the cost of a call, small enough for a second-level cache.
SCRATCH_ELEMENTS = 64 * 8192


class TokenStats(NamedTuple):
    """What the LM head says of each packed token; float32 [T], except `is_top1_T`, which is bool."""

    logprob_T: Tensor
    entropy_T: Tensor
    logsumexp_T: Tensor
    is_top1_T: Tensor


class Scaling(NamedTuple):
    """What turns the products h W^T into logits."""

    bias_V: Tensor | None
    inverse_temperature_T: Tensor
    softcap: float | None

    @property
    def is_plain(self) -> bool:
        """Only temperatures, which every model has."""
        return self.bias_V is None and self.softcap is None

    def part(self, rows: slice | Tensor, columns: slice) -> Scaling:
        bias = None if self.bias_V is None else self.bias_V[columns]
        return Scaling(bias, self.inverse_temperature_T[rows], self.softcap)


def linear_logprob_reference(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """The definition, with all logits at once: product in the dtype of hidden, the rest in float32 (float64 for float64)."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    x_TV = (hidden_TD @ head_VD[:vocab_size].to(hidden_TD.dtype).T).to(dtype)
    if bias is not None:
        x_TV = x_TV + bias[:vocab_size].to(dtype)
    if softcap is not None:
        x_TV = softcap * torch.tanh(x_TV / softcap)
    x_TV = x_TV / torch.as_tensor(temperature, dtype=dtype, device=x_TV.device).expand(len(x_TV))[:, None]
    logsumexp_T = x_TV.logsumexp(-1)
    target_logit_T = x_TV.gather(-1, target_T[:, None])[:, 0]
    logp_TV = x_TV - logsumexp_T[:, None]
    probability_TV = logp_TV.exp()
    # a logit of -inf has probability 0 and adds nothing
    entropy_T = -(probability_TV * logp_TV.clamp(min=MASKED_LOGIT)).sum(-1)
    return TokenStats(target_logit_T - logsumexp_T, entropy_T, logsumexp_T, target_logit_T >= x_TV.amax(-1))


def slices(length: int, step: int) -> Iterator[slice]:
    """slice(0, step), slice(step, 2 step), ... up to length."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def products_(hidden_RD: Tensor, head_CD: Tensor, out_PRC: Tensor) -> None:
    """out[0] = hidden head^T rounded to its dtype; a second plane, where there is one, gets what the rounding lost.

    A CPU's matrix product rounds its float32 sums to bfloat16 as it stores them: 2e-2 nats at a logit of 16. Computed again with
    the rounded product subtracted before that store, what remains is 2^9 times smaller, and so is the error of the sum of both.
    """
    torch.mm(hidden_RD, head_CD.T, out=out_PRC[0])
    if len(out_PRC) == 2:
        torch.addmm(out_PRC[0], hidden_RD, head_CD.T, beta=-1, out=out_PRC[1])


class Block(NamedTuple):
    """Some rows and columns of the products h W^T, and what is needed to make logits of them."""

    products_PRC: Tensor  # one plane in the dtype of hidden, or two that add up; see `products_`
    scaling: Scaling
    target_R: Tensor  # relative to the first column; out of range when the target is in another block

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, logits of these rows in units of log 2, room for as many numbers, softcap's slope), all in scratch memory that
        the next part overwrites."""
        _, num_rows, num_columns = self.products_PRC.shape
        height = max(SCRATCH_ELEMENTS // max(num_columns, 1), 1)
        dtype = self.scaling.inverse_temperature_T.dtype
        shape = (3 if self.scaling.softcap else 2, min(height, num_rows), num_columns)
        scratch = torch.empty(shape, dtype=dtype, device=self.products_PRC.device)
        for rows in slices(num_rows, height):
            x, room, slope = (scratch[index, : rows.stop - rows.start] for index in (0, 1, -1))
            x.copy_(self.products_PRC[0, rows])
            if len(self.products_PRC) == 2:
                x.add_(self.products_PRC[1, rows])
            if self.scaling.bias_V is not None:
                x.add_(self.scaling.bias_V).clamp_(min=MASKED_LOGIT)
            if self.scaling.softcap:
                torch.tanh(x.div_(self.scaling.softcap), out=slope)
                torch.mul(slope, self.scaling.softcap, out=x)
                slope.square_().neg_().add_(1.0)
            yield rows, x.mul_(self.scaling.inverse_temperature_T[rows, None] * LOG2_E), room, slope


class RunningStats:
    """(m, s, u) of the columns seen so far, in units of log 2, and the target's logit; blocks may come in any cut of [T, V]."""

    def __init__(self, num_tokens: int, like: Tensor) -> None:
        self.max_T = like.new_full((num_tokens,), MASKED_LOGIT)
        self.sum_T = like.new_zeros(num_tokens)
        self.weighted_T = like.new_zeros(num_tokens)
        # a target outside the vocabulary has no log-prob; NaN says so
        self.target_logit_T = like.new_full((num_tokens,), float("nan"))

    def add(self, block: Block, first_row: int) -> None:
        """Merge a block whose rows begin at token `first_row`."""
        for rows, x, room, _ in block.parts():
            at = slice(first_row + rows.start, first_row + rows.stop)
            target_R = block.target_R[rows]
            is_here = (target_R >= 0) & (target_R < x.shape[1])
            logit_R = x.gather(1, target_R.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
            self.target_logit_T[at] = torch.where(is_here, logit_R, self.target_logit_T[at])

            old_max_R = self.max_T[at]
            max_R = torch.maximum(old_max_R, x.amax(1))
            p = torch.exp2(x.sub_(max_R[:, None]), out=room)
            shift_R = old_max_R - max_R
            scale_R = shift_R.exp2()
            self.weighted_T[at] = scale_R * (self.weighted_T[at] + self.sum_T[at] * shift_R) + x.mul_(p).sum(1)
            self.sum_T[at] = scale_R * self.sum_T[at] + p.sum(1)
            self.max_T[at] = max_R

    def result(self) -> TokenStats:
        log_sum_T = self.sum_T.log2()
        return TokenStats(
            (self.target_logit_T - self.max_T - log_sum_T) * LN_2,
            (log_sum_T - self.weighted_T / self.sum_T) * LN_2,
            (self.max_T + log_sum_T) * LN_2,
            self.target_logit_T >= self.max_T,
        )


class Upstream(NamedTuple):
    """Per token: the logsumexp, and a, b, g of dx = p (a + b (x - logsumexp)) + g 1(v = y), already divided by the temperature."""

    logsumexp_T: Tensor
    a_T: Tensor
    b_T: Tensor
    g_T: Tensor

    @staticmethod
    def of(g_3T: Tensor, logsumexp_T: Tensor, entropy_T: Tensor, inverse_temperature_T: Tensor) -> Upstream:
        """From the gradients of log-prob, entropy and logsumexp, [3, T]."""
        g_T, g_entropy_T, g_logsumexp_T = g_3T
        a_T, b_T = g_logsumexp_T - g_T - g_entropy_T * entropy_T, -g_entropy_T
        return Upstream(logsumexp_T, *(x_T * inverse_temperature_T for x_T in (a_T, b_T, g_T)))


def stacked(grads: Sequence[Tensor | None], like_T: Tensor) -> Tensor:
    """Gradients as autograd hands them over, [number of them, T] in one dtype; zeros for those that did not come."""
    zero_T = torch.zeros_like(like_T)
    return torch.stack([zero_T if x is None else x.to(zero_T.dtype) for x in grads])


def backward_torch(block: Block, upstream: Upstream, *, has_entropy: bool) -> None:
    """Turn the block's first plane into the gradient of its products; without an entropy gradient b is 0 and left out."""
    logsumexp_R = upstream.logsumexp_T * LOG2_E
    for rows, x, room, slope in block.parts():
        p = torch.exp2(x.sub_(logsumexp_R[rows, None]), out=room)
        if has_entropy:
            x.mul_(upstream.b_T[rows, None] * LN_2).add_(upstream.a_T[rows, None]).mul_(p)
        else:
            x = p.mul_(upstream.a_T[rows, None])
        target_R = block.target_R[rows, None]
        is_here = (target_R >= 0) & (target_R < x.shape[1])
        x.scatter_add_(1, target_R.clamp(0, x.shape[1] - 1), torch.where(is_here, upstream.g_T[rows, None], 0.0))
        block.products_PRC[0, rows] = x.mul_(slope) if block.scaling.softcap else x
