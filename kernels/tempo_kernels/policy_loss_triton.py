"""The Triton kernel of `policy_loss` and how it is launched; formulas are there."""

# Shape letters: T = packed response tokens, S = sequences, M = metrics, B = lanes of a block
from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tempo_kernels.dispatch import jit, launch, tl, triton
from tempo_kernels.jit_math import exp

PolicyLossKind = Literal["ppo", "gspo", "reinforce"]
KLKind = Literal["k1", "k3"]

# exp(10) is far beyond every clip bound; the cap only keeps a lost token from overflowing the ratio.
MAX_LOG_RATIO = 10.0
# Tokens a program reads at a time: fixed, so a sequence's result does not depend on its batch. Two per thread of 8 warps: with
# four, the kernel that uses everything spills a register.
BLOCK = 512

# The rows of what the kernel knows of each sequence: those that add up, and those of which the largest counts.
SUMS = (
    "total", "actor/pg_loss", "actor/pg_clipfrac", "actor/clipfrac_low", "actor/clipfrac_high", "actor/pg_clipfrac_lower",
    "actor/ppo_kl", "actor/kl_loss", "actor/entropy", "actor/ess_weight", "actor/ess_ratio", "actor/ess_ratio_squared",
)  # fmt: skip
MAXES = ("actor/log_ratio_max", "actor/ratio_max")

if triton is not None:
    LOG_RATIO_CAP: tl.constexpr = tl.constexpr(MAX_LOG_RATIO)


class Constants(NamedTuple):
    """What has no gradient."""

    old_logprob_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    ref_logprob_T: Tensor | None
    sampler_logprob_T: Tensor | None
    cu_seqlens_S1: Tensor


class Objective(NamedTuple):
    """What is not a tensor. A bound that is never reached is infinite."""

    kind: PolicyLossKind
    lowest_ratio: float
    highest_ratio: float
    dual_clip: float
    importance_cap: float
    kl: KLKind
    kl_coef: float
    entropy_coef: float


@jit
def _read(pointer, token, mask):
    return tl.load(pointer + token, mask=mask, other=0.0).to(tl.float32)


@jit
def _mean_log_ratio(logprob_ptr, old_logprob_ptr, weight_ptr, length, BLOCK: tl.constexpr):
    """Of the tokens that have a weight."""
    sum_B = tl.zeros((BLOCK,), tl.float32)
    count_B = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        is_live = _read(weight_ptr, token, token < length) != 0.0
        sum_B += _read(logprob_ptr, token, is_live) - _read(old_logprob_ptr, token, is_live)
        count_B += is_live.to(tl.float32)
    return tl.sum(sum_B, 0) / tl.maximum(tl.sum(count_B, 0), 1.0)


@jit
def _pg(logprob, log_ratio, advantage, lowest_ratio, highest_ratio, dual_clip, KIND: tl.constexpr):
    """The ratio, pg and its slope in log pi, and the tokens held at the bounds low, high and dual."""
    is_lost = log_ratio > LOG_RATIO_CAP
    ratio = exp(tl.where(is_lost, LOG_RATIO_CAP, log_ratio))
    is_low = (advantage < 0) & (ratio < lowest_ratio)
    is_high = (advantage > 0) & (ratio > highest_ratio)
    is_dual = (advantage < 0) & (ratio > dual_clip)
    if KIND == "reinforce":
        pg = -advantage * logprob
        slope = -advantage
    else:
        held = tl.where(is_low, lowest_ratio, tl.where(is_high, highest_ratio, tl.where(is_dual, dual_clip, ratio)))
        pg = -advantage * held
        slope = tl.where(is_low | is_high | is_dual | is_lost, 0.0, pg)
    return ratio, pg, slope, is_low.to(tl.float32), is_high.to(tl.float32), is_dual.to(tl.float32)


@jit
def _kl(gap, KL: tl.constexpr):
    """The estimator of a token with log(reference / policy) = gap, and its slope in log pi."""
    if KL == "k1":
        kl = -gap
        slope = tl.full(gap.shape, 1.0, tl.float32)
    else:
        is_lost = gap > LOG_RATIO_CAP
        gap = tl.where(is_lost, LOG_RATIO_CAP, gap)
        kl = exp(gap) - 1.0 - gap
        slope = tl.where(is_lost, 0.0, 1.0 - exp(gap))
    return kl, slope


@jit(do_not_specialize=["num_tokens", "num_sequences", "lowest_ratio", "highest_ratio", "dual_clip", "importance_cap", "kl_coef",
                        "entropy_coef"])  # fmt: skip
def _policy_loss_kernel(
    logprob_ptr, old_logprob_ptr, advantage_ptr, weight_ptr, ref_logprob_ptr, sampler_logprob_ptr, cu_seqlens_ptr,
    entropy_ptr, d_logprob_ptr, d_entropy_ptr, partial_ptr,
    num_tokens, num_sequences, lowest_ratio, highest_ratio, dual_clip, importance_cap, kl_coef, entropy_coef,
    KIND: tl.constexpr, KL: tl.constexpr, HAS_REF: tl.constexpr, HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence -> both gradients of its tokens, and its column of partial[M, S]. Every lane adds up its own tokens."""
    sequence = tl.program_id(0)
    # boundaries beyond the tokens, which nobody looks for on a GPU, must not lead beyond the memory
    start = tl.minimum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), num_tokens)
    length = (tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), num_tokens) - start).to(tl.int32)
    mean = 0.0
    if KIND == "gspo":
        mean = _mean_log_ratio(logprob_ptr + start, old_logprob_ptr + start, weight_ptr + start, length, BLOCK)
    pg_B = tl.zeros((BLOCK,), tl.float32)
    low_B, high_B, dual_B, ppo_kl_B, kl_B, entropy_B = pg_B, pg_B, pg_B, pg_B, pg_B, pg_B
    weight_B, ratio_B, squared_B = pg_B, pg_B, pg_B
    # both are largest of numbers that cannot be negative
    log_ratio_max_B, ratio_max_B = pg_B, pg_B
    for first in range(0, length, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        mask = lane < length
        token = start + lane
        weight = _read(weight_ptr, token, mask)
        is_live = mask & (weight != 0.0)  # what a masked token holds is not even read: 0 * NaN is NaN
        logprob, old_logprob = _read(logprob_ptr, token, is_live), _read(old_logprob_ptr, token, is_live)
        log_ratio = logprob - old_logprob
        ppo_kl_B -= weight * log_ratio
        if KIND == "gspo":
            log_ratio = tl.where(is_live, mean, 0.0)
        ratio, pg, slope, is_low, is_high, is_dual = _pg(
            logprob, log_ratio, _read(advantage_ptr, token, is_live), lowest_ratio, highest_ratio, dual_clip, KIND
        )
        low_B += weight * is_low
        high_B += weight * is_high
        dual_B += weight * is_dual
        log_ratio_max_B = tl.maximum(log_ratio_max_B, tl.abs(log_ratio))
        ratio_max_B = tl.maximum(ratio_max_B, tl.where(is_live, ratio, 0.0))
        if HAS_SAMPLER:
            ratio = exp(old_logprob - _read(sampler_logprob_ptr, token, is_live))
            ratio = tl.where(ratio > importance_cap, importance_cap, ratio)
            pg *= ratio
            slope *= ratio
        pg_B += weight * pg
        weight_B += weight
        ratio_B += weight * ratio
        squared_B += weight * ratio * ratio
        if HAS_REF:
            kl, kl_slope = _kl(_read(ref_logprob_ptr, token, is_live) - logprob, KL)
            kl_B += weight * kl
            slope += kl_coef * kl_slope
        if HAS_ENTROPY:
            entropy_B += weight * _read(entropy_ptr, token, is_live)
            tl.store(d_entropy_ptr + token, -entropy_coef * weight, mask=mask)
        tl.store(d_logprob_ptr + token, weight * slope, mask=mask)
    _store(
        partial_ptr + sequence, num_sequences, kl_coef, entropy_coef, pg_B, low_B, high_B, dual_B, ppo_kl_B, kl_B, entropy_B,
        weight_B, ratio_B, squared_B, log_ratio_max_B, ratio_max_B,
    )  # fmt: skip


@jit
def _store(
    pointer, stride, kl_coef, entropy_coef, pg_B, low_B, high_B, dual_B, ppo_kl_B, kl_B, entropy_B, weight_B, ratio_B,
    squared_B, log_ratio_max_B, ratio_max_B,
):  # fmt: skip
    """One sequence's numbers, in the order of SUMS and MAXES."""
    pg, kl, entropy = tl.sum(pg_B, 0), tl.sum(kl_B, 0), tl.sum(entropy_B, 0)
    low, high = tl.sum(low_B, 0), tl.sum(high_B, 0)
    ppo_kl = tl.sum(ppo_kl_B, 0)
    nan = tl.where(ppo_kl != ppo_kl, ppo_kl, 0.0)  # a maximum would hide it
    tl.store(pointer, pg + kl_coef * kl - entropy_coef * entropy)
    tl.store(pointer + stride, pg)
    tl.store(pointer + 2 * stride, low + high)
    tl.store(pointer + 3 * stride, low)
    tl.store(pointer + 4 * stride, high)
    tl.store(pointer + 5 * stride, tl.sum(dual_B, 0))
    tl.store(pointer + 6 * stride, ppo_kl)
    tl.store(pointer + 7 * stride, kl)
    tl.store(pointer + 8 * stride, entropy)
    tl.store(pointer + 9 * stride, tl.sum(weight_B, 0))
    tl.store(pointer + 10 * stride, tl.sum(ratio_B, 0))
    tl.store(pointer + 11 * stride, tl.sum(squared_B, 0))
    tl.store(pointer + 12 * stride, tl.max(log_ratio_max_B, 0) + nan)
    tl.store(pointer + 13 * stride, tl.max(ratio_max_B, 0) + nan)


def gradients_triton(
    logprob_T: Tensor, entropy_T: Tensor | None, given: Constants, how: Objective
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(d_logprob [T], d_entropy [T], sums in the order of SUMS, maxima in the order of MAXES) in one launch."""
    old_logprob_T, advantage_T, weight_T, ref_T, sampler_T, cu_seqlens_S1 = given
    num_sequences = len(cu_seqlens_S1) - 1
    d_logprob_T = torch.zeros_like(logprob_T, dtype=torch.float32)  # tokens beyond the boundaries have no gradient
    d_entropy_T = None if entropy_T is None else torch.zeros_like(d_logprob_T)
    partial_MS = torch.empty(len(SUMS) + len(MAXES), num_sequences, dtype=torch.float32, device=logprob_T.device)
    absent = logprob_T
    launch(
        _policy_loss_kernel, num_sequences, logprob_T, old_logprob_T, advantage_T, weight_T,
        absent if ref_T is None else ref_T, absent if sampler_T is None else sampler_T, cu_seqlens_S1,
        absent if entropy_T is None else entropy_T, d_logprob_T, absent if d_entropy_T is None else d_entropy_T,
        partial_MS, len(logprob_T), num_sequences, how.lowest_ratio, how.highest_ratio, how.dual_clip, how.importance_cap,
        how.kl_coef, how.entropy_coef, KIND=how.kind, KL=how.kl, HAS_REF=ref_T is not None,
        HAS_SAMPLER=sampler_T is not None, HAS_ENTROPY=entropy_T is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    sums = partial_MS[: len(SUMS)].sum(1)
    largest = partial_MS[len(SUMS) :].amax(1) if num_sequences else sums.new_zeros(len(MAXES))
    return d_logprob_T, d_entropy_T, sums, largest
