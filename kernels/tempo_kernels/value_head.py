"""The token-level value head and its regression loss.

    score_t = h_t . w + b,    V_t = score_t (linear)  or  sigmoid(score_t)

and, with the outcome R of the sequence on every one of its tokens and weights w_t chosen by the caller,

    MSE    1/2 sum_t w_t (V_t - R)^2              (TEMPO, arXiv 2604.19295, eq. 7)
    BCE    sum_t w_t [softplus(score_t) - R score_t]
"""

# Shape letters: N = packed value positions, D = hidden size, S = sequences
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_kernels.policy_loss import Loss
from tempo_kernels.segments import segment_ids, segment_mean

HeadKind = Literal["linear", "sigmoid"]
ValueLossKind = Literal["mse", "bce"]
ValueClip = Literal["none", "token", "sequence_mean"]


def value_score(hidden_ND: Tensor, weight_D: Tensor, bias: Tensor) -> Tensor:
    """score = hidden . weight + bias, [N], in float32 (float64 when hidden is): a difference of two values near 1 would drown
    in bf16 spacing.

    Raises ValueError when the hidden sizes differ.
    """
    if hidden_ND.shape[-1] != weight_D.shape[-1]:
        raise ValueError(f"hidden size is {hidden_ND.shape[-1]}, the value head wants {weight_D.shape[-1]}")
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
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

    `clip` bounds how far a value may move from `old_value_N`: each token by itself (PPO), or only the mean movement of its
    sequence (the authors' release of TEMPO: V^clip = V + clip(mean dV, +-range) - mean dV); the larger of the two losses counts.

    Raises:
        ValueError: an unknown choice, shapes that differ, BCE with a linear head or a clip, a clip without its old values.
    """
    for name, value, choices in (("head", head, HeadKind), ("loss", loss, ValueLossKind), ("clip", clip, ValueClip)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    if not score_N.shape == return_N.shape == weight_N.shape:
        shapes = [tuple(x.shape) for x in (score_N, return_N, weight_N)]
        raise ValueError(f"score, return and weight must have one shape, got {shapes}")
    value_N = value_of(score_N, head)
    if loss == "bce":
        if head != "sigmoid" or clip != "none":
            raise ValueError("bce wants a sigmoid head and no value clip")
        loss_N = F.softplus(score_N) - return_N * score_N
    else:
        loss_N = 0.5 * (value_N - return_N) ** 2
    if clip != "none":
        if old_value_N is None:
            raise ValueError(f"value clip {clip!r} needs old_value_N")
        move_N = value_N - old_value_N
        if clip == "token":
            clipped_N = old_value_N + move_N.clamp(-clip_range, clip_range)
        else:
            if cu_seqlens_S1 is None:
                raise ValueError("value clip 'sequence_mean' needs cu_seqlens_S1")
            mean_S = segment_mean(move_N, cu_seqlens_S1)
            shift_S = mean_S.clamp(-clip_range, clip_range) - mean_S
            clipped_N = value_N + shift_S[segment_ids(cu_seqlens_S1)]
        loss_N = torch.maximum(loss_N, 0.5 * (clipped_N - return_N) ** 2)
    total = (weight_N * loss_N).sum()
    with torch.no_grad():
        metrics = {
            "critic/vf_loss": total.detach(),
            "critic/vpred_mean": (weight_N * value_N).sum(),
            "critic/abs_error": (weight_N * (value_N - return_N).abs()).sum(),
        }
    return Loss(total, metrics)
