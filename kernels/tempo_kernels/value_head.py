"""The token-level value head, its regression loss, and both in one pass over the hidden states.

    score_t = x_t . w + b,    V_t = score_t (linear)  or  sigmoid(score_t)

where x_t is the hidden state h_t, or, given the weight n of an RMSNorm before the head, x_t = n h_t r_t with
r_t = 1 / sqrt(mean(h_t^2) + eps). With the outcome R of the sequence on every one of its tokens and weights w_t of the caller,

    MSE    1/2 sum_t w_t (V_t - R)^2              (TEMPO, arXiv 2604.19295, eq. 7)
    BCE    sum_t w_t [softplus(score_t) - R score_t]

A value clip bounds how far values move from old ones: the larger of two losses counts, that of V_t and that of
V_t + clip(m_t, +-range) - m_t. The move m_t is V_t - V_t^old (`token`: PPO), or its mean over the sequence (`sequence_mean`: the
authors' release of TEMPO). A row with weight 0 is masked: it is in no sum and no mean, whatever its hidden state holds.

The norm's weight folds into the head's, u = n w, so that with d_t = dloss / dscore_t and c_t = r_t (h_t . u), score_t = c_t + b and

    du = sum_t d_t r_t h_t,   db = sum_t d_t,   dh_t = d_t r_t (u - h_t r_t c_t / D)      (without a norm: r_t = 1, dh_t = d_t u)

The kernels know d_t as soon as they know the score, so they form du while h_t is still in registers: hidden is read once, and the
backward pass reads it only for the gradient of a norm. `sequence_mean` reads it twice, the first time for the sequences' means.
"""

# Shape letters: N = packed value positions, D = hidden size, S = sequences, B = bins, P = programs, K = numbers to add up
from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.dispatch import use_triton
from tempo_kernels.policy_loss import Loss
from tempo_kernels.segments import segment_ids, segment_lengths, segment_sum
from tempo_kernels.value_head_triton import MAX_HIDDEN_SIZE, Terms, backward_triton, loss_triton, score_triton

HeadKind = Literal["linear", "sigmoid"]
ValueLossKind = Literal["mse", "bce"]
ValueClip = Literal["none", "token", "sequence_mean"]

# Sums of weight times: loss, value, |value - return|, whether the clipped loss counts, 1, return, its square, error, its square.
METRICS = (
    "critic/vf_loss",
    "critic/vpred_mean",
    "critic/abs_error",
    "critic/vf_clipfrac",
    "critic/weight",
    "critic/return_mean",
    "critic/return_square",
    "critic/error_mean",
    "critic/error_square",
)


class ValueLoss(NamedTuple):
    """A scalar to call backward on, and what the op knows, detached.

    Metrics and bins add up over micro-batches. With W = critic/weight and the error R - V, the explained variance is
    1 - (error_square / W - (error_mean / W)^2) / (return_square / W - (return_mean / W)^2), all under critic/.
    """

    total: Tensor
    metrics: dict[str, Tensor]  # those of METRICS
    value_N: Tensor  # 0 where the weight is 0
    bins_3B: (
        Tensor  # per bin of the value clamped to its range: sums of weight, weight * clamped value, weight * return
    )


def value_score(hidden_ND: Tensor, weight_D: Tensor, bias: Tensor) -> Tensor:
    """score = hidden . weight + bias, [N], in float32 (float64 when hidden is): a difference of two values near 1 would drown
    in bf16 spacing.

    Raises ValueError when the hidden sizes differ.
    """
    if hidden_ND.shape[-1] != weight_D.shape[-1]:
        raise ValueError(f"hidden size is {hidden_ND.shape[-1]}, the value head wants {weight_D.shape[-1]}")
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # which would multiply in half precision
        return hidden_ND.to(dtype) @ weight_D.to(dtype) + bias.to(dtype)


def value_of(score_N: Tensor, head: HeadKind) -> Tensor:
    """The values that scores stand for, [N]."""
    return score_N.sigmoid() if head == "sigmoid" else score_N


def value_loss(
    score_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    head: HeadKind = "linear",
    loss: ValueLossKind = "mse",
    clip: ValueClip = "none",
    clip_range: float = 0.1,
    old_value_N: Tensor | None = None,
    cu_seqlens_S1: Tensor | None = None,
) -> Loss:
    """sum_t w_t loss_t of the formulas at the top of this file, with gradient through `score_N`.

    Raises:
        ValueError: an unknown choice, shapes that differ, BCE with a linear head or a clip, a clip without its old values.
    """
    terms = Terms(head, loss, clip, clip_range)
    _check_terms(terms, score_N.shape, return_N, weight_N, old_value_N, cu_seqlens_S1)
    total, metrics, _ = _loss_torch(score_N, return_N, weight_N, terms, old_value_N, cu_seqlens_S1)
    return Loss(total, dict(zip(METRICS[:3], metrics[:3], strict=True)))


def _loss_torch(
    score_N: Tensor, return_N: Tensor, weight_N: Tensor, terms: Terms, old_value_N: Tensor | None,
    cu_seqlens_S1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(total, sums in the order of METRICS, values), as the formulas say."""
    is_live_N = weight_N != 0
    score_N, return_N = (torch.where(is_live_N, x, 0.0) for x in (score_N, return_N))
    value_N = value_of(score_N, terms.head)
    error_N = value_N - return_N
    is_clipped_N = torch.zeros_like(is_live_N)
    if terms.loss == "bce":
        loss_N = F.softplus(score_N) - return_N * score_N
    else:
        loss_N = 0.5 * error_N**2
    if old_value_N is not None and terms.clip != "none":
        move_N = torch.where(is_live_N, value_N - old_value_N, 0.0)
        if cu_seqlens_S1 is not None and terms.clip == "sequence_mean":
            count_S = segment_sum(is_live_N.to(move_N.dtype), cu_seqlens_S1).clamp(min=1)
            move_N = (segment_sum(move_N, cu_seqlens_S1) / count_S)[segment_ids(cu_seqlens_S1)]
        shift_N = move_N.clamp(-terms.clip_range, terms.clip_range) - move_N
        clipped_N = 0.5 * (error_N + shift_N) ** 2
        is_clipped_N = clipped_N > loss_N
        loss_N = torch.maximum(loss_N, clipped_N)
    total = (weight_N * loss_N).sum()
    with torch.no_grad():
        columns = (
            loss_N, value_N, error_N.abs(), is_clipped_N, torch.ones_like(value_N), return_N, return_N**2, -error_N,
            error_N**2,
        )  # fmt: skip
        metrics = torch.stack([(weight_N * column).sum() for column in columns])
    return total, metrics, torch.where(is_live_N, value_N, 0.0)


@torch.no_grad()
def _bins_torch(value_N: Tensor, return_N: Tensor, weight_N: Tensor, terms: Terms) -> Tensor:
    """[3, B], see `ValueLoss`."""
    low, high = terms.value_range
    value_N = value_N.clamp(low, high)
    bin_N = ((value_N - low) * (terms.num_bins / (high - low))).floor().clamp(max=terms.num_bins - 1)
    is_in_BN = bin_N == torch.arange(terms.num_bins, device=bin_N.device)[:, None]
    is_in_BN &= weight_N != 0
    columns = (weight_N, weight_N * value_N, weight_N * return_N)
    return torch.stack([torch.where(is_in_BN, column, 0.0).sum(1) for column in columns]).float()


class _ValueScore(torch.autograd.Function):
    """score_t = r_t (h_t . u) + b by the kernels; eps None: r_t = 1."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, eps: float | None) -> Tensor:
        score_N, rstd_N, projection_N = score_triton(hidden_ND, weight_D, bias, eps)
        ctx.save_for_backward(hidden_ND, weight_D, rstd_N, projection_N)
        return score_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscore_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_D, rstd_N, projection_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return *backward_triton(
            hidden_ND, weight_D, dscore_N.contiguous(), rstd_N, projection_N, like=hidden_ND,
            needs_hidden=needs_hidden, needs_weight=needs_weight or needs_bias,
        ), None  # fmt: skip


class _ValueHeadLoss(torch.autograd.Function):
    """Score, loss and the gradients of both in one pass by the kernels: the backward pass only multiplies."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, return_N: Tensor, weight_N: Tensor,
        old_value_N: Tensor | None, cu_seqlens_S1: Tensor | None, eps: float | None, terms: Terms, needs_weight: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        result = loss_triton(
            hidden_ND, weight_D, bias, return_N, weight_N, old_value_N, cu_seqlens_S1, eps, terms, needs_weight
        )
        ctx.like = hidden_ND.new_empty(0)
        ctx.save_for_backward(
            None if eps is None else hidden_ND, weight_D, result.dscore_N, result.rstd_N, result.projection_N,
            result.dweight_D, result.dbias,
        )  # fmt: skip
        ctx.mark_non_differentiable(result.metrics, result.value_N, result.bins_3B)
        ctx.set_materialize_grads(False)
        return result.metrics[0].clone(), result.metrics, result.value_N, result.bins_3B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream is None:
            return (None,) * 10
        hidden_ND, weight_D, dscore_N, rstd_N, projection_N, dweight_D, dbias = ctx.saved_tensors
        dhidden_ND = None
        if ctx.needs_input_grad[0]:
            dhidden_ND, _, _ = backward_triton(
                hidden_ND, weight_D, dscore_N * upstream, rstd_N, projection_N, like=ctx.like,
                needs_hidden=True, needs_weight=False,
            )  # fmt: skip
        dweight_D, dbias = (None if x is None else x * upstream for x in (dweight_D, dbias))
        return dhidden_ND, dweight_D, dbias, *(None,) * 7


def value_head(
    hidden_ND: Tensor,
    weight_D: Tensor,
    bias: Tensor,
    *,
    head: HeadKind = "linear",
    norm_weight_D: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Same as `value_of(value_score(rms_norm(hidden_ND), weight_D, bias), head)`, [N] float32 (float64 when hidden is), in one
    pass over hidden; differentiable in hidden and all weights.

    Triton kernels run it on a GPU, PyTorch elsewhere and for hidden sizes beyond 8192 (see `tempo_kernels.dispatch`).

    Args:
        hidden_ND: any float dtype, rows may be strided.
        weight_D: [D], or [1, D] as `nn.Linear` has it. bias: a scalar or [1]. Any float dtype.
        norm_weight_D: weight of an RMSNorm before the head, without it there is none. It is computed in float32 throughout,
            where transformers' Llama and Qwen3 round the normalised state to the dtype of hidden: a value keeps its digits.

    Raises:
        ValueError: an unknown head, shapes or devices that do not fit.
    """
    _check_choice("head", head, HeadKind)
    weight_D, bias = _folded(hidden_ND, weight_D, bias, norm_weight_D)
    eps = None if norm_weight_D is None else norm_eps
    if _is_fused(hidden_ND):
        return value_of(_ValueScore.apply(_with_unit_stride(hidden_ND), weight_D, bias, eps), head)
    return value_of(value_score(_normalised(hidden_ND, eps), weight_D, bias), head)


def value_head_loss(
    hidden_ND: Tensor,
    weight_D: Tensor,
    bias: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    head: HeadKind = "linear",
    loss: ValueLossKind = "mse",
    clip: ValueClip = "none",
    clip_range: float = 0.1,
    old_value_N: Tensor | None = None,
    cu_seqlens_S1: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_eps: float = 1e-6,
    num_bins: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> ValueLoss:
    """Same as `value_loss(value_score(rms_norm(hidden_ND), weight_D, bias), ...)` with more metrics, in one pass over hidden;
    differentiable in hidden and all weights. A frozen hidden costs no gradient, and rows with weight 0 are not even read.

    Args:
        hidden_ND, weight_D, bias, norm_weight_D: see `value_head`. The others: see `value_loss`.
        num_bins: reliability bins of equal width over `value_range`, what the critic regresses a wrong and a right answer on.

    Raises:
        ValueError: as `value_head` and `value_loss` do, or bins that do not exist.
    """
    terms = Terms(head, loss, clip, clip_range, num_bins, value_range)
    weight_D, bias = _folded(hidden_ND, weight_D, bias, norm_weight_D)
    _check_terms(terms, hidden_ND.shape[:1], return_N, weight_N, old_value_N, cu_seqlens_S1)
    eps = None if norm_weight_D is None else norm_eps
    return_N, weight_N = (x.detach().to(weight_D.dtype) for x in (return_N, weight_N))
    old_value_N = None if old_value_N is None else old_value_N.detach().to(weight_D.dtype)
    if _is_fused(hidden_ND):
        needs_weight = torch.is_grad_enabled() and (weight_D.requires_grad or bias.requires_grad)
        total, metrics, value_N, bins_3B = _ValueHeadLoss.apply(
            _with_unit_stride(hidden_ND), weight_D, bias, return_N.contiguous(), weight_N.contiguous(),
            None if old_value_N is None else old_value_N.contiguous(), cu_seqlens_S1, eps, terms, needs_weight,
        )  # fmt: skip
    else:
        is_masked_N = weight_N == 0
        if weight_N.is_cuda or is_masked_N.any():  # a copy of hidden and of its gradient: only where it is needed
            hidden_ND = hidden_ND.masked_fill(is_masked_N[:, None], 0.0)
        score_N = value_score(_normalised(hidden_ND, eps), weight_D, bias)
        total, metrics, value_N = _loss_torch(score_N, return_N, weight_N, terms, old_value_N, cu_seqlens_S1)
        bins_3B = _bins_torch(value_N.detach(), return_N, weight_N, terms)
    return ValueLoss(total, dict(zip(METRICS, metrics, strict=True)), value_N.detach(), bins_3B)


def _is_fused(hidden_ND: Tensor) -> bool:
    return use_triton(hidden_ND) and hidden_ND.shape[1] <= MAX_HIDDEN_SIZE


def _with_unit_stride(hidden_ND: Tensor) -> Tensor:
    return hidden_ND if hidden_ND.stride(1) == 1 else hidden_ND.contiguous()


def _normalised(hidden_ND: Tensor, eps: float | None) -> Tensor:
    """h_t r_t; eps None: h_t."""
    if eps is None:
        return hidden_ND
    x_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)


def _folded(
    hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, norm_weight_D: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u = n w, [D], and b, a scalar, both in float32 (float64 when hidden is)."""
    if hidden_ND.ndim != 2 or not hidden_ND.is_floating_point():
        raise ValueError(
            f"want hidden [N, D] of a floating dtype, got {hidden_ND.dtype} of shape {tuple(hidden_ND.shape)}"
        )
    size = hidden_ND.shape[1]
    for name, x, shapes in (
        ("weight", weight_D, ((size,), (1, size))),
        ("bias", bias, ((), (1,))),
        ("norm_weight", norm_weight_D, ((size,),)),
    ):
        if x is not None and (x.shape not in shapes or x.device != hidden_ND.device):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"want {name} {wanted} on {hidden_ND.device}, got {list(x.shape)} on {x.device}")
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    weight_D = weight_D.reshape(size).to(dtype)
    if norm_weight_D is not None:
        weight_D = weight_D * norm_weight_D.to(dtype)
    return weight_D.contiguous(), bias.reshape(()).to(dtype)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def _check_terms(
    terms: Terms, shape: torch.Size, return_N: Tensor, weight_N: Tensor, old_value_N: Tensor | None,
    cu_seqlens_S1: Tensor | None,
) -> None:  # fmt: skip
    for name, value, choices in (
        ("head", terms.head, HeadKind), ("loss", terms.loss, ValueLossKind), ("clip", terms.clip, ValueClip)
    ):  # fmt: skip
        _check_choice(name, value, choices)
    if not shape == return_N.shape == weight_N.shape:
        shapes = [tuple(x) for x in (shape, return_N.shape, weight_N.shape)]
        raise ValueError(f"score, return and weight must have one shape, got {shapes}")
    if terms.loss == "bce" and (terms.head != "sigmoid" or terms.clip != "none"):
        raise ValueError("bce wants a sigmoid head and no value clip")
    if terms.clip != "none":
        if old_value_N is None:
            raise ValueError(f"value clip {terms.clip!r} needs old_value_N")
        if old_value_N.shape != shape:
            raise ValueError(f"want one old value per row ({shape[0]}), got shape {tuple(old_value_N.shape)}")
    if terms.clip == "sequence_mean":
        if cu_seqlens_S1 is None:
            raise ValueError("value clip 'sequence_mean' needs cu_seqlens_S1")
        # looking on a GPU would make the host wait
        if not cu_seqlens_S1.is_cuda and int(segment_lengths(cu_seqlens_S1).sum()) != shape[0]:
            raise ValueError(f"cu_seqlens must end at {shape[0]}, the number of rows, got {int(cu_seqlens_S1[-1])}")
    low, high = terms.value_range
    if terms.num_bins < 1 or not low < high:
        raise ValueError(f"want at least one bin over a range (low, high), got {terms.num_bins} over {low, high}")
