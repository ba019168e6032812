"""GAE-free advantages over packed sequences (TEMPO, arXiv 2604.19295, eq. 11) and their whitening.

A response of T_i tokens has T_i + 1 values: V(x, y_<t) before each token t, which is an action-independent baseline, and
V(x, y_T) after the last one, EOS included. With an outcome R_i per sequence, the advantage of token t is

    A_t = R_i - V(x, y_<t)                            R_i is the verified label, or V(x, y_T) where there is none
    white_t = (A_t - mean) / sqrt(var + eps)          mean and unbiased variance of the token's population
    white_t = A_t / sqrt(mean(A^2) + eps)             without centring: keeps the sign

Statistics are (count, mean, m2 = sum (A - mean)^2). Parts of a population, be they blocks, sequences or ranks, are merged by

    mean = sum_k n_k mean_k / sum_k n_k,   m2 = sum_k m2_k + n_k (mean_k - mean)^2          (Chan, Golub and LeVeque 1979)

in a fixed order and in float64; E[A^2] - E[A]^2 appears nowhere. PyTorch works in float64 throughout. The kernels compute in
float32 within a block and a sequence: mean and variance are good to about 1e-6 of the largest |A|, and equal numbers have
exactly themselves as mean, so they whiten to 0.
"""

# Shape letters: T = packed response tokens, S = sequences, TS = T + S values (one more than tokens in each sequence),
# N = T or TS, P = populations, K = parts of a population
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.dispatch import jit, launch, tl, use_triton
from tempo_kernels.jit_math import rounded
from tempo_kernels.segments import boundaries, segment_ids, segment_lengths, segment_mean, segment_sum

# Tokens a program reads at a time: fixed, so a sequence's result does not depend on its batch.
BLOCK = 1024
# Every population reads all tokens; for more of them (one per prompt, say) sorting is less work.
MAX_POPULATIONS = 8


class Moments(NamedTuple):
    """Statistics of each population, float64: Moments([3], [4], [26]) of the numbers 1, 3, 8."""

    count_P: Tensor
    mean_P: Tensor
    m2_P: Tensor


def split_values(value_TS: Tensor, cu_seqlens_S1: Tensor) -> tuple[Tensor, Tensor]:
    """Split T + 1 values per sequence into the baselines V(x, y_<t), [T], and the terminal values V(x, y_T), [S].

    Raises ValueError when there are not exactly T + S values.
    """
    length_S = segment_lengths(cu_seqlens_S1)
    num_tokens, num_sequences = int(cu_seqlens_S1[-1]), len(length_S)
    if value_TS.shape != (num_tokens + num_sequences,):
        raise ValueError(
            f"{num_sequences} sequences with {num_tokens} tokens have {num_tokens + num_sequences} values "
            f"(one more than tokens in each), got shape {tuple(value_TS.shape)}"
        )
    # each sequence before it adds one terminal value
    sequence_S = torch.arange(num_sequences, device=value_TS.device)
    index_T = torch.arange(num_tokens, device=value_TS.device) + sequence_S.repeat_interleave(length_S)
    return value_TS[index_T], value_TS[cu_seqlens_S1[1:] + sequence_S]


def returns(outcome_S: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """R_i for every token of sequence i, [T], in the dtype of the outcomes."""
    _check_outcome(outcome_S, len(cu_seqlens_S1) - 1)
    return outcome_S[segment_ids(cu_seqlens_S1)]


def _check_outcome(outcome_S: Tensor, num_sequences: int) -> None:
    if outcome_S.shape != (num_sequences,):
        raise ValueError(
            f"want one outcome per sequence ({num_sequences}), got {outcome_S.numel()} of shape {tuple(outcome_S.shape)}"
        )


def _advantage_torch(outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor, has_terminal: bool) -> Tensor:
    baseline_T, terminal_S = split_values(value_N, cu_seqlens_S1) if has_terminal else (value_N, value_N)
    outcome_S = terminal_S if outcome_S is None else outcome_S
    dtype = torch.promote_types(value_N.dtype, torch.float32)
    return returns(outcome_S.to(dtype), cu_seqlens_S1) - baseline_T.to(dtype)


@jit
def _block_moments(x, mask):
    """Count, mean and m2 of the numbers under the mask."""
    count = tl.sum(mask.to(tl.float32), 0)
    size = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(mask, x, 0.0), 0) / size
    mean += tl.sum(tl.where(mask, x - mean, 0.0), 0) / size  # what rounding took
    away = tl.where(mask, x - mean, 0.0)
    return count, mean, tl.sum(away * away, 0)


@jit
def _advantage_kernel(
    outcome_ptr, value_ptr, cu_seqlens_ptr, advantage_ptr, moments_ptr,
    HAS_OUTCOME: tl.constexpr, HAS_TERMINAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence -> its advantages and their row of moments[S, 3]. Its values begin at start, plus one terminal value for each
    sequence before it."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    value_ptr += start + sequence if HAS_TERMINAL else start
    length = (end - start).to(tl.int32)
    outcome = tl.load(outcome_ptr + sequence if HAS_OUTCOME else value_ptr + length).to(tl.float32)
    count = tl.full((), 0.0, tl.float32)
    mean, m2 = count, count
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mask = token < length
        x = outcome - tl.load(value_ptr + token, mask=mask, other=0.0).to(tl.float32)
        tl.store(advantage_ptr + start + token, x, mask=mask)
        count_block, mean_block, m2_block = _block_moments(x, mask)
        away, share = mean_block - mean, count_block / (count + count_block)
        m2 += m2_block + away * away * count * share
        mean += away * share
        count += count_block
    tl.store(moments_ptr + 3 * sequence, count)
    tl.store(moments_ptr + 3 * sequence + 1, mean)
    tl.store(moments_ptr + 3 * sequence + 2, m2)


@jit
def _advantage_backward_kernel(
    d_advantage_ptr, cu_seqlens_ptr, d_outcome_ptr, d_value_ptr,
    HAS_OUTCOME: tl.constexpr, HAS_TERMINAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each baseline gets minus its token's gradient, and the outcome, or the terminal value in its place, their sum."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    d_value_ptr += start + sequence if HAS_TERMINAL else start
    length = (end - start).to(tl.int32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mask = token < length
        g = tl.load(d_advantage_ptr + start + token, mask=mask, other=0.0)
        tl.store(d_value_ptr + token, rounded(-g, d_value_ptr), mask=mask)
        sum_B += g
    d_outcome = tl.sum(sum_B, 0)
    if HAS_OUTCOME:
        tl.store(d_outcome_ptr + sequence, d_outcome)
        d_outcome = tl.full((), 0.0, tl.float32)
    if HAS_TERMINAL:
        tl.store(d_value_ptr + length, rounded(d_outcome, d_value_ptr))


class _Advantage(torch.autograd.Function):
    """The kernels: A_t, and (count, mean, m2) of each sequence's, [S, 3]."""

    @staticmethod
    def forward(
        ctx: Any, outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        num_sequences = len(cu_seqlens_S1) - 1
        ctx.has_outcome, ctx.has_terminal = outcome_S is not None, len(value_N) > num_tokens
        advantage_T = torch.empty(num_tokens, dtype=torch.float32, device=value_N.device)
        moments_S3 = torch.empty(num_sequences, 3, dtype=torch.float32, device=value_N.device)
        launch(
            _advantage_kernel, num_sequences, value_N if outcome_S is None else outcome_S, value_N, cu_seqlens_S1,
            advantage_T, moments_S3, HAS_OUTCOME=ctx.has_outcome, HAS_TERMINAL=ctx.has_terminal, BLOCK=BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(value_N, cu_seqlens_S1)
        ctx.mark_non_differentiable(moments_S3)
        ctx.set_materialize_grads(False)
        return advantage_T, moments_S3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value_N, cu_seqlens_S1), d_advantage_T = ctx.saved_tensors, grads[0]
        if d_advantage_T is None:
            return None, None, None, None
        num_sequences = len(cu_seqlens_S1) - 1
        d_value_N = torch.empty_like(value_N)
        d_outcome_S = torch.empty(num_sequences, dtype=torch.float32, device=value_N.device)
        launch(
            _advantage_backward_kernel, num_sequences, d_advantage_T.contiguous(), cu_seqlens_S1, d_outcome_S, d_value_N,
            HAS_OUTCOME=ctx.has_outcome, HAS_TERMINAL=ctx.has_terminal, BLOCK=BLOCK,
        )  # fmt: skip
        return d_outcome_S if ctx.has_outcome else None, d_value_N, None, None


def _advantage_triton(
    outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    outcome_S = None if outcome_S is None else outcome_S.float().contiguous()
    return _Advantage.apply(outcome_S, value_N.contiguous(), cu_seqlens_S1.contiguous(), num_tokens)


def advantage(outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """A_t = R - V(x, y_<t) for every token t of a sequence with outcome R, [T] float32 (float64 for float64 values).

    TEMPO, arXiv 2604.19295, eq. 11 (with the action-independent baseline y_<t). When R is the verified label this equals
    generalised advantage estimation with gamma = lambda = 1 and the reward on the last token. Differentiable.

    Args:
        outcome_S: outcome of each sequence: the label, or the critic's terminal value. None: each sequence's own V(x, y_T).
        value_N: T + 1 values per sequence, packed, or only the T baselines V(x, y_<t) when the outcomes are given.
        cu_seqlens_S1: boundaries of the responses, [S + 1] int64.

    Raises:
        ValueError: the shapes do not belong together.
    """
    num_tokens = _check(outcome_S, value_N, cu_seqlens_S1)
    if _is_triton(outcome_S, value_N):
        return _advantage_triton(outcome_S, value_N, cu_seqlens_S1, num_tokens)[0]
    return _advantage_torch(outcome_S, value_N, cu_seqlens_S1, len(value_N) > num_tokens)


def _is_triton(outcome_S: Tensor | None, value_N: Tensor) -> bool:
    return use_triton(value_N) and (outcome_S is None or use_triton(outcome_S))


def _check(outcome_S: Tensor | None, value_N: Tensor, cu_seqlens_S1: Tensor) -> int:
    """T: the one number on the GPU that the host must wait for, as N does not tell it."""
    if not cu_seqlens_S1.is_cuda:
        segment_lengths(cu_seqlens_S1)
    num_tokens, num_sequences = int(cu_seqlens_S1[-1]), len(cu_seqlens_S1) - 1
    num_both = num_tokens + num_sequences
    if value_N.shape != (num_both,) and (outcome_S is None or value_N.shape != (num_tokens,)):
        baselines = "" if outcome_S is None else f", or {num_tokens} without the terminal ones"
        raise ValueError(
            f"{num_sequences} sequences with {num_tokens} tokens have {num_both} values (one more than tokens in each)"
            f"{baselines}, got shape {tuple(value_N.shape)}"
        )
    if outcome_S is not None:
        _check_outcome(outcome_S, num_sequences)
    return num_tokens


def _merge(count_PK: Tensor, mean_PK: Tensor, m2_PK: Tensor) -> Moments:
    """The parts of each population -> its statistics."""
    count_PK, mean_PK, m2_PK = count_PK.double(), mean_PK.double(), m2_PK.double()
    count_P = count_PK.sum(1)
    mean_P = (count_PK * mean_PK).sum(1) / count_P.clamp(min=1)
    return Moments(count_P, mean_P, (m2_PK + count_PK * (mean_PK - mean_P[:, None]) ** 2).sum(1))


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """The statistics of all parts together, merged in the order given: ranks gather theirs, three numbers per population, and
    merge them in rank order, so all get the same bits."""
    if not parts or len({part.count_P.shape for part in parts}) > 1:
        raise ValueError(f"want moments of the same populations, got {[tuple(part.count_P.shape) for part in parts]}")
    return _merge(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))


@jit(do_not_specialize=["num_tokens", "num_blocks", "num_populations"])
def _moments_kernel(
    advantage_ptr, population_ptr, part_ptr, num_tokens, num_blocks, num_populations, BLOCK: tl.constexpr
):
    """One block of tokens and one population -> an entry of part[3, P, blocks]."""
    program = tl.program_id(0)
    token = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    x = tl.load(advantage_ptr + token, mask=mask, other=0.0).to(tl.float32)
    population = tl.load(population_ptr + token, mask=mask, other=-1)
    count, mean, m2 = _block_moments(x, population == program // num_blocks)
    plane = num_blocks.to(tl.int64) * num_populations
    tl.store(part_ptr + program, count)
    tl.store(part_ptr + plane + program, mean)
    tl.store(part_ptr + 2 * plane + program, m2)


@torch.no_grad()
def moments(advantage_T: Tensor, population_T: Tensor, num_populations: int) -> Moments:
    """Count, mean and sum of squared distances from it of each population 0 .. P-1. An empty one has three zeros."""
    _check_population(advantage_T, population_T, num_populations)
    if use_triton(advantage_T) and num_populations <= MAX_POPULATIONS:
        num_blocks = -(-len(advantage_T) // BLOCK)
        part_3PK = torch.empty(3, num_populations, num_blocks, dtype=torch.float32, device=advantage_T.device)
        launch(
            _moments_kernel, num_populations * num_blocks, advantage_T.contiguous(), population_T.contiguous(), part_3PK,
            len(advantage_T), num_blocks, num_populations, BLOCK=BLOCK,
        )  # fmt: skip
        return _merge(*part_3PK)
    return _moments_torch(advantage_T, population_T, num_populations)


def _moments_torch(advantage_T: Tensor, population_T: Tensor, num_populations: int) -> Moments:
    # sorted, because sums over scattered rows have no fixed order on a GPU
    count_P = torch.bincount(population_T, minlength=num_populations)
    x_T = advantage_T.double()[population_T.argsort(stable=True)]
    mean_P = segment_mean(x_T, boundaries(count_P))
    away_T = x_T - mean_P.repeat_interleave(count_P)
    return Moments(count_P.double(), mean_P, segment_sum(away_T**2, boundaries(count_P)))


def _check_population(x: Tensor, population: Tensor, num_populations: int) -> None:
    if population.shape != x.shape or population.is_floating_point() or population.dtype == torch.bool:
        raise ValueError(
            f"want one integer population for each of {len(x)}, got {population.dtype} of shape {tuple(population.shape)}"
        )
    is_seen = not population.is_cuda and population.numel() > 0  # looking on a GPU would make the host wait
    if is_seen and not 0 <= int(population.min()) <= int(population.max()) < num_populations:
        raise ValueError(
            f"populations must be within 0..{num_populations - 1}, got {int(population.min())}..{int(population.max())}"
        )


@jit(do_not_specialize=["num_tokens", "num_populations"])
def _whiten_kernel(
    advantage_ptr, population_ptr, table_ptr, white_ptr, num_tokens, num_populations, BLOCK: tl.constexpr
):
    """table[3, P] holds the shift in two parts, for the digits that float32 has no room for, and 1 / scale."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    population = tl.load(population_ptr + token, mask=mask, other=0)
    is_known = mask & (population >= 0) & (population < num_populations)
    x = tl.load(advantage_ptr + token, mask=mask, other=0.0).to(tl.float32)
    x -= tl.load(table_ptr + population, mask=is_known, other=float("nan"))
    x -= tl.load(table_ptr + num_populations + population, mask=is_known, other=0.0)
    x *= tl.load(table_ptr + 2 * num_populations + population, mask=is_known, other=0.0)
    tl.store(white_ptr + token, x, mask=mask)


@torch.no_grad()
def whiten(
    advantage_T: Tensor,
    population_T: Tensor,
    *,
    center: bool = True,
    eps: float = 1e-8,
    statistics: Moments | None = None,
) -> Tensor:
    """(A - mean) / sqrt(var + eps), with mean and (unbiased) variance taken over each population by itself, [T] float32 (or
    float64).

    `population_T` numbers each token's population from 0: all zeros for one population, is_labelled for two, the number of the
    prompt for groups. With `center=False` A is only divided by its scale, sqrt(mean(A^2) + eps), which keeps its sign. A
    population of one token is centred to 0. The result is a constant.

    Args:
        statistics: of each population, such as `merge_moments` of all ranks'. When not given: of these tokens, for which the
            host waits for a GPU to tell the number of populations; `moments(advantage_T, population_T, P)` avoids that.
    """
    if statistics is None:
        num_populations = int(population_T.max()) + 1 if population_T.numel() else 0
        statistics = moments(advantage_T, population_T, num_populations)
    count_P, mean_P, m2_P = statistics
    _check_population(advantage_T, population_T, len(count_P))
    if center:
        shift_P, var_P = mean_P, (m2_P / (count_P - 1).clamp(min=1)).masked_fill(count_P < 2, 1.0)
    else:
        # About zero, not about the mean: advantages that hardly differ must not blow up.
        shift_P, var_P = torch.zeros_like(mean_P), m2_P / count_P.clamp(min=1) + mean_P**2
    scale_P = (var_P + eps).sqrt()
    if not use_triton(advantage_T):
        white_T = (advantage_T.double() - shift_P[population_T]) / scale_P[population_T]
        return white_T.to(torch.promote_types(advantage_T.dtype, torch.float32))
    white_T = torch.empty(len(advantage_T), dtype=torch.float32, device=advantage_T.device)
    table_3P = torch.stack([shift_P, shift_P - shift_P.float(), 1.0 / scale_P]).float()
    launch(
        _whiten_kernel, -(-len(advantage_T) // BLOCK), advantage_T.contiguous(), population_T.contiguous(), table_3P, white_T,
        len(advantage_T), len(count_P), BLOCK=BLOCK,
    )  # fmt: skip
    return white_T


@torch.no_grad()
def whitened_advantage(
    outcome_S: Tensor | None,
    value_N: Tensor,
    cu_seqlens_S1: Tensor,
    population_S: Tensor,
    *,
    num_populations: int,
    center: bool = True,
    eps: float = 1e-8,
    merge: Callable[[Moments], Moments] | None = None,
) -> tuple[Tensor, Moments]:
    """Same as `whiten(advantage(...), population_T)` of whole sequences, and the statistics used: on a GPU the kernel that
    computes the advantages takes their statistics in the same pass.

    `merge` turns this rank's statistics into those of all ranks: gather them, then `merge_moments`.
    """
    num_tokens = _check(outcome_S, value_N, cu_seqlens_S1)
    _check_population(cu_seqlens_S1[1:], population_S, num_populations)
    population_T = population_S.repeat_interleave(cu_seqlens_S1.diff(), output_size=num_tokens)
    if _is_triton(outcome_S, value_N):
        advantage_T, moments_S3 = _advantage_triton(outcome_S, value_N, cu_seqlens_S1, num_tokens)
        is_member_PS = population_S == torch.arange(num_populations, device=population_S.device)[:, None]
        statistics = _merge(*(torch.where(is_member_PS, x_S, 0.0) for x_S in moments_S3.unbind(1)))
    else:
        advantage_T = _advantage_torch(outcome_S, value_N, cu_seqlens_S1, len(value_N) > num_tokens)
        statistics = moments(advantage_T, population_T, num_populations)
    statistics = statistics if merge is None else merge(statistics)
    return whiten(advantage_T, population_T, center=center, eps=eps, statistics=statistics), statistics


def group_advantage(outcome_S: Tensor, group_S: Tensor, *, divide_by_std: bool, eps: float = 1e-6) -> Tensor:
    """GRPO's baseline: (R - mean of its group) [/ (std of its group + eps)], [S] float32 (arXiv 2402.03300, eq. 9).

    `group_S` numbers the groups 0 .. G-1. The standard deviation is unbiased; a group of one gets 0. float64 in PyTorch: there
    is one number per sequence, too few for a kernel to matter.
    """
    outcome_S = outcome_S.double()
    count_G, mean_G, m2_G = _moments_torch(outcome_S, group_S, int(group_S.max()) + 1 if len(group_S) else 0)
    centred_S = outcome_S - mean_G[group_S]
    if divide_by_std:
        var_G = m2_G / (count_G - 1).clamp(min=1)
        centred_S = centred_S / (var_G.sqrt()[group_S] + eps)
    return centred_S.float()


@torch.no_grad()
def explained_variance(value_N: Tensor, return_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """1 - Var(return - value) / Var(return), a float64 scalar; 1 is perfect, 0 as good as a constant. NaN when the returns of
    positive weight do not vary."""
    if not value_N.shape == return_N.shape == (return_N if weight_N is None else weight_N).shape:
        shapes = [tuple(x.shape) for x in (value_N, return_N, weight_N) if x is not None]
        raise ValueError(f"want value, return and weight of one shape, got {shapes}")
    value_N, return_N = value_N.double(), return_N.double()
    weight_N = torch.ones_like(return_N) if weight_N is None else weight_N.double()

    def variance(x_N: Tensor) -> Tensor:
        mean = (weight_N * x_N).sum() / weight_N.sum()
        return (weight_N * (x_N - mean) ** 2).sum() / weight_N.sum()

    if return_N.numel() == 0:
        return return_N.new_full((), math.nan)
    highest = return_N.masked_fill(weight_N <= 0, -math.inf).max()
    lowest = return_N.masked_fill(weight_N <= 0, math.inf).min()
    return torch.where(highest > lowest, 1.0 - variance(return_N - value_N) / variance(return_N), math.nan)
