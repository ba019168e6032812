"""The Triton kernels of `linear_logprob` and how they are launched; formulas are there."""

# Shape letters: T = packed response tokens, D = hidden size, V = vocabulary, R = rows of a block, C = its columns
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tempo_kernels.dispatch import INTERPRETER, Target, jit, launch, target_of, tl, triton
from tempo_kernels.jit_math import LOG2E, MASKED, exp, operand, rounded, tanh
from tempo_kernels.linear_logprob_torch import Scaling, TokenStats, slices

# Columns whose (m, s, u) is computed at once.
PART_COLUMNS = 128
# Tokens of one forward launch: their statistics take 12 bytes per part, 120 MB for a vocabulary of 150,000.
FORWARD_ROWS = 8192
if triton is not None:
    PART: tl.constexpr = tl.constexpr(PART_COLUMNS)


class Tile(NamedTuple):
    """A program's share of the logits, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Where logits are read instead of computed there is no product to feed: small tiles, many at a time.
KEPT_TILE = Tile(32, PART_COLUMNS, 32, 4, 1)


def tile_for(target: Target, dtype: torch.dtype, *, is_plain: bool) -> Tile:
    """Fixed by hardware, dtype and model, never by the number of tokens: a token's result does not depend on its batch.

    The sizes are the largest that ahead-of-time compilation shows to spill no register (benchmarks/README.md); softcap and
    kept logits need more of them. Statistics are merged part by part, so the width of a tile changes no bit of them.
    """
    if target.backend == "cpu":
        return Tile(128, 512, 128, 4, 1)
    if dtype == torch.float32:
        return Tile(64, 128, 32, 8, 2)
    if target.backend == "hip":
        return Tile(128, 256, 32, 8, 2)
    depth = 64 if target.arch in (80, 90, 100, 103) else 32  # other GPUs have 100 KB of shared memory
    return Tile(128, 256 if is_plain else 128, depth, 8, 3)


@jit
def _place(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of this program: groups of 8 row tiles sweep the columns together, so the head is read from cache."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    program = tl.program_id(0)
    group = program // (8 * column_tiles)
    height = tl.minimum(row_tiles - group * 8, 8)
    within = program - group * 8 * column_tiles
    return group * 8 + within % height, within // height


@jit
def _product(
    hidden_ptr, head_ptr, row, column, num_rows, num_columns, hidden_stride, head_stride,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """hidden[row] @ head[column].T in float32, [ROWS, COLUMNS]. Rows past the end repeat the last: nobody reads them."""
    row = tl.minimum(row, num_rows - 1).to(tl.int64)
    column = tl.minimum(column, num_columns - 1).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    hidden_ptrs = hidden_ptr + row[:, None] * hidden_stride + depth[None, :]
    head_ptrs = head_ptr + column[None, :] * head_stride + depth[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        if SIZE % DEPTH == 0:
            a = tl.load(hidden_ptrs)
            b = tl.load(head_ptrs)
        else:
            a = tl.load(hidden_ptrs, mask=depth[None, :] < SIZE - start, other=0.0)
            b = tl.load(head_ptrs, mask=depth[:, None] < SIZE - start, other=0.0)
        # "ieee": float32 stays float32, as PyTorch's default is; half precision is not affected
        product = tl.dot(operand(a), operand(b), product, input_precision="ieee")
        hidden_ptrs += DEPTH
        head_ptrs += DEPTH
    return product


@jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@jit
def _parts(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns, PART at a time: what follows the product works on one part after the other, and registers suffice."""
    if COLUMNS == PART:
        parts = (product,)
    elif COLUMNS == 2 * PART:
        parts = _halves(product, ROWS, COLUMNS)
    else:
        left, right = _halves(product, ROWS, COLUMNS)
        first, second = _halves(left, ROWS, COLUMNS // 2)
        third, fourth = _halves(right, ROWS, COLUMNS // 2)
        parts = (first, second, third, fourth)
    return parts


@jit
def _logits(
    product,
    bias_ptr,
    column,
    inverse_temperature,
    softcap,
    num_columns,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Products -> logits; columns past the vocabulary become MASKED, and so does what is below it."""
    x = product
    is_column = column < num_columns
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    x = x * inverse_temperature[:, None]
    if HAS_BIAS:
        x = tl.where(x < MASKED, MASKED, x)  # a bias of -inf; NaN stays NaN
    return tl.where(is_column[None, :], x, MASKED)


@jit(do_not_specialize=["num_rows", "softcap"])
def _forward_kernel(
    hidden_ptr, head_ptr, target_ptr, bias_ptr, inverse_temperature_ptr, partial_ptr, target_logit_ptr, kept_ptr,
    num_rows, num_columns, hidden_stride, head_stride, kept_stride, softcap,
    SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of logits -> (m, s, u) of each part of a row, into partial[3, parts, R], and the target's logit where it is here.

    Logits are kept as distances to the maximum of their part: half precision is then finest where probability is.
    """
    row_tile, column_tile = _place(num_rows, num_columns, ROWS, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    product = _product(
        hidden_ptr, head_ptr, row, column_tile * COLUMNS + tl.arange(0, COLUMNS), num_rows, num_columns, hidden_stride, head_stride,
        SIZE, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    parts = _parts(product, ROWS, COLUMNS)
    inverse_temperature = tl.load(inverse_temperature_ptr + row, mask=is_row, other=1.0)
    target = tl.load(target_ptr + row, mask=is_row, other=-1).to(tl.int32)
    plane = num_rows.to(tl.int64) * tl.cdiv(num_columns, PART)
    for part in tl.static_range(COLUMNS // PART):  # pyright: ignore[reportGeneralTypeIssues]
        first = column_tile * COLUMNS + part * PART
        column = first + tl.arange(0, PART)
        x = _logits(parts[part], bias_ptr, column, inverse_temperature, softcap, num_columns, HAS_BIAS, HAS_SOFTCAP)
        is_here = is_row & (target >= first) & (target < tl.minimum(first + PART, num_columns))
        target_logit = tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        tl.store(target_logit_ptr + row, target_logit, mask=is_here)
        max_R = tl.max(x, 1)
        x -= tl.expand_dims(max_R, 1)
        if IS_KEPT:
            corner = kept_ptr + (row_tile * ROWS).to(tl.int64) * kept_stride + first
            offset = tl.arange(0, ROWS)[:, None] * kept_stride + tl.arange(0, PART)[None, :]
            tl.store(corner + offset, rounded(x, kept_ptr), mask=is_row[:, None] & (column < num_columns)[None, :])
        p = exp(x)
        # the last tile may reach a part that has no column at all (the interpreter wants a whole mask, not one scalar)
        is_part = is_row & (first + tl.zeros_like(row) < num_columns)
        offset = (column_tile * (COLUMNS // PART) + part).to(tl.int64) * num_rows + row
        tl.store(partial_ptr + offset, max_R, mask=is_part)
        tl.store(partial_ptr + plane + offset, tl.sum(p, 1), mask=is_part)
        tl.store(partial_ptr + 2 * plane + offset, tl.sum(p * x, 1), mask=is_part)


@jit(do_not_specialize=["num_rows", "num_columns", "num_parts"])
def _merge_kernel(
    partial_ptr, target_ptr, target_logit_ptr, logprob_ptr, entropy_ptr, logsumexp_ptr, is_top1_ptr,
    num_rows, num_columns, num_parts, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(m, s, u) of all parts -> the statistics of each token, PARTS at a time, always in the same order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    plane = num_parts.to(tl.int64) * num_rows
    max_R = tl.full((ROWS,), MASKED, tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    weighted_R = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & is_row[None, :]
        pointer = partial_ptr + part.to(tl.int64)[:, None] * num_rows + row[None, :]
        max_PR = tl.load(pointer, mask=mask, other=MASKED)
        sum_PR = tl.load(pointer + plane, mask=mask, other=0.0)
        weighted_PR = tl.load(pointer + 2 * plane, mask=mask, other=0.0)
        new_max = tl.maximum(max_R, tl.max(max_PR, 0))
        shift_R, shift_PR = max_R - new_max, max_PR - new_max[None, :]
        scale_R, scale_PR = exp(shift_R), exp(shift_PR)
        weighted_R = scale_R * (weighted_R + sum_R * shift_R)
        weighted_R += tl.sum(scale_PR * (weighted_PR + sum_PR * shift_PR), 0)
        sum_R = scale_R * sum_R + tl.sum(scale_PR * sum_PR, 0)
        max_R = new_max
    target = tl.load(target_ptr + row, mask=is_row, other=0)
    is_target = is_row & (target >= 0) & (target < num_columns)
    # a target outside the vocabulary has no log-prob; NaN says so
    target_logit = tl.load(target_logit_ptr + row, mask=is_target, other=float("nan"))
    log_sum = tl.log2(tl.where(is_row, sum_R, 1.0)) / LOG2E
    tl.store(logprob_ptr + row, (target_logit - max_R) - log_sum, mask=is_row)
    tl.store(entropy_ptr + row, log_sum - weighted_R / sum_R, mask=is_row)
    tl.store(logsumexp_ptr + row, max_R + log_sum, mask=is_row)
    tl.store(is_top1_ptr + row, target_logit >= max_R, mask=is_row)


@jit
def _dproduct(
    x, column, target, logsumexp, a, b, g, inverse_temperature, softcap, num_columns, HAS_SOFTCAP: tl.constexpr
):
    """Logits -> the gradient of the products they came from; the target's element is formed in float32. a, b and g are already
    divided by the temperature."""
    logp = x - logsumexp[:, None]
    dx = exp(logp) * (a[:, None] + b[:, None] * logp)
    dx = tl.where(column[None, :] == target[:, None], dx + g[:, None], dx)
    if HAS_SOFTCAP:
        capped = tl.where((column < num_columns)[None, :], x / (inverse_temperature * softcap)[:, None], 0.0)
        dx *= 1.0 - capped * capped
    return tl.where((column < num_columns)[None, :], dx, 0.0)


@jit(do_not_specialize=["num_rows", "softcap"])
def _backward_kernel(
    hidden_ptr, head_ptr, target_ptr, bias_ptr, inverse_temperature_ptr, kept_max_ptr, upstream_ptr, dproduct_ptr,
    num_rows, num_columns, hidden_stride, head_stride, dproduct_stride, softcap,
    SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_KEPT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of logits, computed again or kept in dproduct, -> dproduct. upstream[4, R] holds logsumexp, a, b, g."""
    row_tile, column_tile = _place(num_rows, num_columns, ROWS, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    if not IS_KEPT:
        product = _product(
            hidden_ptr, head_ptr, row, column_tile * COLUMNS + tl.arange(0, COLUMNS), num_rows, num_columns,
            hidden_stride, head_stride, SIZE, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        parts = _parts(product, ROWS, COLUMNS)
    inverse_temperature = tl.load(inverse_temperature_ptr + row, mask=is_row, other=1.0)
    target = tl.load(target_ptr + row, mask=is_row, other=-1).to(tl.int32)
    logsumexp = tl.load(upstream_ptr + row, mask=is_row, other=0.0)
    a = tl.load(upstream_ptr + num_rows + row, mask=is_row, other=0.0)
    b = tl.load(upstream_ptr + 2 * num_rows + row, mask=is_row, other=0.0)
    g = tl.load(upstream_ptr + 3 * num_rows + row, mask=is_row, other=0.0)
    for part in tl.static_range(COLUMNS // PART):  # pyright: ignore[reportGeneralTypeIssues]
        first = column_tile * COLUMNS + part * PART
        column = first + tl.arange(0, PART)
        mask = is_row[:, None] & (column < num_columns)[None, :]
        corner = dproduct_ptr + (row_tile * ROWS).to(tl.int64) * dproduct_stride + first
        pointer = corner + tl.arange(0, ROWS)[:, None] * dproduct_stride + tl.arange(0, PART)[None, :]
        if IS_KEPT:
            offset = (column_tile * (COLUMNS // PART) + part).to(tl.int64) * num_rows + row
            max_R = tl.load(kept_max_ptr + offset, mask=is_row & (first + tl.zeros_like(row) < num_columns), other=0.0)
            x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) + max_R[:, None]
            x = tl.where(x < MASKED, MASKED, x)
        else:
            x = parts[part]  # pyright: ignore[reportPossiblyUnboundVariable]
            x = _logits(x, bias_ptr, column, inverse_temperature, softcap, num_columns, HAS_BIAS, HAS_SOFTCAP)
        dproduct = _dproduct(
            x, column, target, logsumexp, a, b, g, inverse_temperature, softcap, num_columns, HAS_SOFTCAP
        )
        tl.store(pointer, rounded(dproduct, dproduct_ptr), mask=mask)


def forward_triton(
    hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, scaling: Scaling, kept_TV: Tensor | None
) -> tuple[TokenStats, Tensor | None]:
    """The statistics, and for kept logits the maxima of all parts, [parts, T], which they are relative to."""
    target_logit_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32)
    logprob_T, entropy_T, logsumexp_T = (torch.empty_like(target_logit_T) for _ in range(3))
    stats = TokenStats(logprob_T, entropy_T, logsumexp_T, torch.empty_like(target_T, dtype=torch.bool))
    everything = slice(0, len(head_VD))
    kept_max = None
    for rows in slices(len(hidden_TD), FORWARD_ROWS if kept_TV is None else len(hidden_TD)):
        partial = _forward(
            hidden_TD[rows], head_VD, target_T[rows], scaling.part(rows, everything), kept_TV, target_logit_T[rows],
            TokenStats(*(x[rows] for x in stats)),
        )  # fmt: skip
        kept_max = None if kept_TV is None else partial[0].clone()  # the other two planes are not needed any more
    return stats, kept_max


def _forward(
    hidden_RD: Tensor, head_VD: Tensor, target_R: Tensor, scaling: Scaling, kept_RV: Tensor | None, target_logit_R: Tensor,
    stats: TokenStats,
) -> Tensor:  # fmt: skip
    """Fill the statistics of some rows, and return those of all parts, [3, parts, R]."""
    (num_rows, size), num_columns = hidden_RD.shape, len(head_VD)
    tile = tile_for(target_of(hidden_RD), hidden_RD.dtype, is_plain=kept_RV is None and scaling.is_plain)
    num_parts = -(-num_columns // PART_COLUMNS)
    partial = hidden_RD.new_empty(3, num_parts, num_rows, dtype=torch.float32)
    launch(
        _forward_kernel, -(-num_rows // tile.rows) * -(-num_columns // tile.columns), hidden_RD, head_VD, target_R,
        _or(scaling.bias_V, hidden_RD), scaling.inverse_temperature_T, partial, target_logit_R, _or(kept_RV, hidden_RD),
        num_rows, num_columns, hidden_RD.stride(0), head_VD.stride(0), 0 if kept_RV is None else kept_RV.stride(0),
        scaling.softcap or 1.0, SIZE=size, HAS_BIAS=scaling.bias_V is not None, HAS_SOFTCAP=scaling.softcap is not None,
        IS_KEPT=kept_RV is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    launch(
        _merge_kernel, -(-num_rows // 32), partial, target_R, target_logit_R, *stats, num_rows, num_columns, num_parts,
        ROWS=32, PARTS=32,
    )  # fmt: skip
    return partial


def backward_triton(
    hidden_RD: Tensor, head_CD: Tensor, target_R: Tensor, scaling: Scaling, upstream_4R: Tensor,
    dproduct_RC: Tensor, kept_max: Tensor | None, first_column: int,
) -> None:  # fmt: skip
    """Fill one block of dproduct, which holds the kept logits when `kept_max` is given."""
    target = target_of(hidden_RD)
    tile = tile_for(target, hidden_RD.dtype, is_plain=scaling.is_plain)
    num_rows, num_columns = dproduct_RC.shape
    if kept_max is not None:
        tile = tile if target == INTERPRETER else KEPT_TILE
        kept_max = kept_max[first_column // PART_COLUMNS :]
    launch(
        _backward_kernel, -(-num_rows // tile.rows) * -(-num_columns // tile.columns), hidden_RD, head_CD, target_R,
        _or(scaling.bias_V, hidden_RD), scaling.inverse_temperature_T, _or(kept_max, upstream_4R), upstream_4R, dproduct_RC,
        num_rows, num_columns, hidden_RD.stride(0), head_CD.stride(0), dproduct_RC.stride(0), scaling.softcap or 1.0,
        SIZE=hidden_RD.shape[1], HAS_BIAS=scaling.bias_V is not None, HAS_SOFTCAP=scaling.softcap is not None,
        IS_KEPT=kept_max is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel's pointer always points somewhere; one that its constants leave out is never followed."""
    return unused if x is None else x
