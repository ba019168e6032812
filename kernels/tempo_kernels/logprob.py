"""Log-probabilities of chosen tokens from logits that exist already; `linear_logprob` is the op that never makes them.

With x_t = z_t / temperature_t for logits z, log-prob, entropy and logsumexp and their gradients are those at the top of
`linear_logprob.py`. A row of logits is read once forward, in blocks whose (m, s, u) are merged in order, and once backward:

    dz_tv = [p_tv (a_t + b_t (x_tv - logsumexp_t)) + g_t 1(v = y_t)] / temperature_t

A row nobody asks about (all its upstream gradients are 0) is not read, its gradient is 0. The gradient may take the logits' memory.
"""

# Shape letters: T = tokens, V = vocabulary, M = upstream gradients: of log-prob, entropy and logsumexp
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.dispatch import Target, jit, launch, target_of, tl, use_triton
from tempo_kernels.jit_math import LOG2E, MASKED, exp, rounded
from tempo_kernels.linear_logprob_torch import (
    Block,
    RunningStats,
    Scaling,
    TokenStats,
    Upstream,
    backward_torch,
    linear_logprob_reference,
    stacked,
)

__all__ = ["TokenStats", "gather_logprob", "gather_logprob_reference"]


def gather_logprob_reference(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """The definition, in float32 (float64 for float64)."""
    x_TV = logits_TV[:, :vocab_size].to(torch.promote_types(logits_TV.dtype, torch.float32))
    identity_VV = torch.eye(x_TV.shape[1], dtype=x_TV.dtype, device=x_TV.device)
    return linear_logprob_reference(x_TV, identity_VV, target_T, temperature=temperature)


class _Width(NamedTuple):
    """Columns that a program holds in registers at a time, and how it is compiled."""

    columns: int
    num_warps: int


def _width(target: Target, num_columns: int) -> _Width:
    """Fixed by hardware and vocabulary, never by the number of tokens: a token's result does not depend on its batch."""
    if target.backend == "cpu":
        return _Width(min(1 << (num_columns - 1).bit_length(), 1024), 4)
    # 16 numbers per thread: enough loads are under way to keep memory busy
    most = _Width(8192, 16) if target.backend == "cuda" else _Width(4096, 4)
    columns = max(min(1 << (num_columns - 1).bit_length(), most.columns), 1024)
    return _Width(columns, max(columns * most.num_warps // most.columns, 4))


@jit
def _forward_kernel(
    logits_ptr, target_ptr, inverse_temperature_ptr, logprob_ptr, entropy_ptr, logsumexp_ptr, is_top1_ptr,
    num_columns, logits_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of one row."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    max_ = tl.full((), MASKED, tl.float32)
    sum_ = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
        x = tl.where(x < MASKED, MASKED, x)  # a logit of -inf; NaN stays NaN
        x = tl.where(column < num_columns, x * inverse_temperature, MASKED)
        new_max = tl.maximum(max_, tl.max(x, 0))
        shift = max_ - new_max
        scale = exp(shift)
        x -= new_max
        p = exp(x)
        weighted = scale * (weighted + sum_ * shift) + tl.sum(p * x, 0)
        sum_ = scale * sum_ + tl.sum(p, 0)
        max_ = new_max
    target = tl.load(target_ptr + row)
    is_target = (target >= 0) & (target < num_columns)
    # a target outside the vocabulary has no log-prob; NaN says so
    target_logit = tl.load(logits_ptr + target, mask=is_target, other=float("nan")).to(tl.float32) * inverse_temperature
    log_sum = tl.log2(sum_) / LOG2E
    tl.store(logprob_ptr + row, (target_logit - max_) - log_sum)
    tl.store(entropy_ptr + row, log_sum - weighted / sum_)
    tl.store(logsumexp_ptr + row, max_ + log_sum)
    tl.store(is_top1_ptr + row, target_logit >= max_)


@jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    logits_ptr, target_ptr, inverse_temperature_ptr, logsumexp_ptr, entropy_ptr, upstream_ptr, dlogits_ptr,
    num_rows, num_columns, width, logits_stride, dlogits_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row, of `width` columns with the padded ones. dlogits may be logits: the block is read, then written."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) - row * blocks) * BLOCK + tl.arange(0, BLOCK)
    dlogits_ptr += row.to(tl.int64) * dlogits_stride
    g = tl.load(upstream_ptr + row)
    g_entropy = tl.load(upstream_ptr + num_rows + row)
    g_logsumexp = tl.load(upstream_ptr + 2 * num_rows + row)
    if (g != 0.0) | (g_entropy != 0.0) | (g_logsumexp != 0.0):
        logits_ptr += row.to(tl.int64) * logits_stride
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        logsumexp = tl.load(logsumexp_ptr + row)
        b = -g_entropy * inverse_temperature
        a = (g_logsumexp - g) * inverse_temperature + b * tl.load(entropy_ptr + row)
        x = tl.load(logits_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
        logp = tl.where(x < MASKED, MASKED, x) * inverse_temperature - logsumexp
        dx = exp(logp) * (a + b * logp)
        dx += tl.where(column == tl.load(target_ptr + row), g * inverse_temperature, 0.0)
        dx = tl.where(column < num_columns, dx, 0.0)
        tl.store(dlogits_ptr + column, rounded(dx, dlogits_ptr), mask=column < width)
    else:
        zeros = tl.zeros((BLOCK,), tl.float32)
        tl.store(dlogits_ptr + column, zeros.to(dlogits_ptr.dtype.element_ty), mask=column < width)


def _forward_triton(logits_TV: Tensor, target_T: Tensor, inverse_temperature_T: Tensor, vocab_size: int) -> TokenStats:
    logprob_T, entropy_T, logsumexp_T = (torch.empty_like(inverse_temperature_T) for _ in range(3))
    stats = TokenStats(logprob_T, entropy_T, logsumexp_T, torch.empty_like(target_T, dtype=torch.bool))
    width = _width(target_of(logits_TV), vocab_size)
    launch(
        _forward_kernel, len(logits_TV), logits_TV, target_T, inverse_temperature_T, *stats, vocab_size,
        logits_TV.stride(0), BLOCK=width.columns, num_warps=width.num_warps,
    )  # fmt: skip
    return stats


def _forward_torch(logits_TV: Tensor, target_T: Tensor, inverse_temperature_T: Tensor, vocab_size: int) -> TokenStats:
    running = RunningStats(len(logits_TV), inverse_temperature_T)
    running.add(_block(logits_TV[:, :vocab_size], target_T, inverse_temperature_T), 0)
    return running.result()


def _block(logits_RV: Tensor, target_R: Tensor, inverse_temperature_R: Tensor) -> Block:
    # adding a bias also makes logits of -inf finite
    zero_V = inverse_temperature_R.new_zeros(logits_RV.shape[1])
    return Block(logits_RV[None], Scaling(zero_V, inverse_temperature_R, None), target_R)


class _Saved(NamedTuple):
    """What the backward pass needs."""

    logits_TV: Tensor
    target_T: Tensor
    inverse_temperature_T: Tensor
    logsumexp_T: Tensor
    entropy_T: Tensor


def _backward_triton(saved: _Saved, upstream_MT: Tensor, dlogits_TV: Tensor, vocab_size: int) -> None:
    num_tokens, num_columns = saved.logits_TV.shape
    width = _width(target_of(saved.logits_TV), vocab_size)
    launch(
        _backward_kernel, num_tokens * -(-num_columns // width.columns), *saved, upstream_MT, dlogits_TV,
        num_tokens, vocab_size, num_columns, saved.logits_TV.stride(0), dlogits_TV.stride(0),
        BLOCK=width.columns, num_warps=width.num_warps,
    )  # fmt: skip


def _backward_torch(saved: _Saved, upstream_MT: Tensor, dlogits_TV: Tensor, vocab_size: int) -> None:
    live = (upstream_MT != 0).any(0).nonzero()[:, 0]
    logits_TV, dpart_TV = saved.logits_TV[:, :vocab_size], dlogits_TV[:, :vocab_size]
    is_whole = len(live) == len(dlogits_TV)
    if is_whole:
        dlive_RV = dpart_TV if dlogits_TV is saved.logits_TV else dpart_TV.copy_(logits_TV)
        dlogits_TV[:, vocab_size:] = 0
    else:
        dlive_RV = logits_TV[live]
        dlogits_TV.zero_()
    _, target_R, inverse_temperature_R, logsumexp_R, entropy_R = (x if is_whole else x[live] for x in saved)
    g_3R = upstream_MT if is_whole else upstream_MT[:, live]
    upstream = Upstream.of(g_3R, logsumexp_R, entropy_R, inverse_temperature_R)
    backward_torch(_block(dlive_RV, target_R, inverse_temperature_R), upstream, has_entropy=bool((g_3R[1] != 0).any()))
    if not is_whole:
        dpart_TV[live] = dlive_RV


class _GatherLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, inverse_temperature_T: Tensor, vocab_size: int, in_place: bool
    ) -> tuple[Tensor, ...]:
        forward = _forward_triton if use_triton(logits_TV) else _forward_torch
        stats = forward(logits_TV, target_T, inverse_temperature_T, vocab_size)
        ctx.vocab_size, ctx.in_place, ctx.is_spent = vocab_size, in_place, False
        ctx.save_for_backward(logits_TV, target_T, inverse_temperature_T, stats.logsumexp_T, stats.entropy_T)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.is_top1_T)
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_spent:
            raise RuntimeError(
                "the logits of gather_logprob were overwritten by its first backward pass; "
                "to go backward twice, call it with in_place_backward=False"
            )
        saved = _Saved(*(x.detach() for x in ctx.saved_tensors))
        upstream_MT = stacked(grads[:3], saved.logsumexp_T)
        dlogits_TV = saved.logits_TV
        if ctx.in_place:
            ctx.is_spent = True
        else:
            dlogits_TV = torch.empty_like(dlogits_TV, memory_format=torch.contiguous_format)
        backward = _backward_triton if use_triton(dlogits_TV) else _backward_torch
        backward(saved, upstream_MT, dlogits_TV, ctx.vocab_size)
        if ctx.in_place:
            # kernels write behind autograd's back: whoever else kept these logits must get its error, not their gradient
            torch.autograd.graph.increment_version(dlogits_TV)
        return dlogits_TV, None, None, None, None


def gather_logprob(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    in_place_backward: bool = False,
) -> TokenStats:
    """Same as `log_softmax(logits_TV / temperature)[arange(T), target_T]`, plus entropy, logsumexp and whether no token was more
    likely than the target; all but the last are differentiable. float32 throughout (float64 for float64 logits).

    Triton kernels run it on a GPU, PyTorch elsewhere (see `tempo_kernels.dispatch`).

    Args:
        logits_TV: any float dtype, rows may be strided. Logits of -inf have probability 0.
        target_T: token ids; on a GPU, where looking would make the host wait, those outside the vocabulary get NaN.
        temperature: one number, or one for each token, [T].
        vocab_size: the true vocabulary, when the logits have padded columns after it: these get no probability and no gradient.
        in_place_backward: the backward pass overwrites the logits with their gradient, which saves memory for T x V numbers.
            Only where nobody needs the logits afterwards, neither the caller nor the backward pass of the op that made them (a
            matrix product doesn't, a tanh does: autograd then raises its error about a modified tensor). It works only once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, a target outside the
            vocabulary (on a CPU), `in_place_backward` on a leaf that requires grad or on rows that share memory.
    """
    vocab_size = logits_TV.shape[-1] if vocab_size is None else vocab_size
    _check(logits_TV, target_T, temperature, vocab_size, in_place_backward)
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    inverse_temperature = torch.as_tensor(temperature, dtype=dtype, device=logits_TV.device).detach().reciprocal()
    results = _GatherLogprob.apply(
        logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous(), target_T.long().contiguous(),
        inverse_temperature.expand(len(logits_TV)).contiguous(), vocab_size, in_place_backward,
    )  # fmt: skip
    return TokenStats(*results)


def _check(
    logits_TV: Tensor, target_T: Tensor, temperature: float | Tensor, vocab_size: int, in_place_backward: bool
) -> None:
    if logits_TV.ndim != 2 or not logits_TV.is_floating_point():
        raise ValueError(
            f"want logits [T, V] of a floating dtype, got {logits_TV.dtype} of shape {tuple(logits_TV.shape)}"
        )
    num_tokens, num_columns = logits_TV.shape
    if not 0 < vocab_size <= num_columns:
        raise ValueError(f"vocab_size must be within 1..{num_columns}, the columns of logits, got {vocab_size}")
    if target_T.shape != (num_tokens,) or target_T.is_floating_point() or target_T.device != logits_TV.device:
        raise ValueError(
            f"want one integer target per row of logits ({num_tokens}) on {logits_TV.device}, "
            f"got {target_T.dtype} of shape {tuple(target_T.shape)} on {target_T.device}"
        )
    if isinstance(temperature, Tensor) and temperature.shape not in ((), target_T.shape):
        raise ValueError(f"want one temperature, or one per token ({num_tokens}), got {tuple(temperature.shape)}")
    is_positive = not isinstance(temperature, Tensor) and temperature > 0
    if isinstance(temperature, Tensor):
        is_positive = temperature.is_cuda or bool((temperature > 0).all())  # looking on a GPU would make the host wait
    if not is_positive:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if in_place_backward and logits_TV.is_leaf and logits_TV.requires_grad:
        raise ValueError(
            "in_place_backward would overwrite logits that are a leaf requiring grad; pass what computed them, or False"
        )
    if in_place_backward and num_tokens > 1 and logits_TV.stride(0) < num_columns and logits_TV.stride(1) == 1:
        raise ValueError(
            f"in_place_backward wants rows that share no memory, got logits of strides {logits_TV.stride()}"
        )
    if not target_T.is_cuda:
        is_outside = (target_T < 0) | (target_T >= vocab_size)
        if is_outside.any():
            raise ValueError(f"targets must be within 0..{vocab_size - 1}, got {target_T[is_outside][:5].tolist()}")
