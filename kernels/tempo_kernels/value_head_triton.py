"""The Triton kernels of `value_head` and how they are launched; formulas are there."""

# Shape letters: N = packed value positions, D = hidden size, S = sequences, B = bins, P = programs, K = numbers to add up
from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tempo_kernels.dispatch import jit, launch, tl, triton
from tempo_kernels.jit_math import exp, rounded

# Programs that share the rows: constant, so a sum over rows has the same bits on every GPU.
PROGRAMS = 256
# Rows of hidden states are held in registers whole, up to this many columns.
MAX_HIDDEN_SIZE = 8192
# Length of `value_head.METRICS`, which _loss_kernel adds up in that order.
NUM_METRICS = 9

if triton is not None:
    TOKEN: tl.constexpr = tl.constexpr(1)
    SEQUENCE: tl.constexpr = tl.constexpr(2)


class Terms(NamedTuple):
    """What is summed: the loss, and the bins of `ValueLoss`."""

    head: Literal["linear", "sigmoid"]
    loss: str
    clip: str
    clip_range: float
    num_bins: int = 10
    value_range: tuple[float, float] = (0.0, 1.0)

    @property
    def constants(self) -> dict[str, int | bool]:
        clip = {"none": 0, "token": 1, "sequence_mean": 2}[self.clip]
        return {"IS_SIGMOID": self.head == "sigmoid", "IS_BCE": self.loss == "bce", "CLIP": clip}


class LossResult(NamedTuple):
    metrics: Tensor
    value_N: Tensor
    bins_3B: Tensor
    dscore_N: Tensor
    rstd_N: Tensor | None
    projection_N: Tensor | None
    dweight_D: Tensor | None
    dbias: Tensor | None


@jit
def _hidden(hidden_ptr, row, is_live, hidden_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of hidden in float32, [ROWS, BLOCK]; 0 where the row is not live and beyond SIZE."""
    column = tl.arange(0, BLOCK)
    pointer = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + column[None, :]
    return tl.load(pointer, mask=is_live[:, None] & (column < SIZE)[None, :], other=0.0).to(tl.float32)


@jit
def _project(x, weight, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, IS_NORMED: tl.constexpr):
    """(r_t, c_t) of each row."""
    projection = tl.sum(x * weight[None, :], 1)
    rstd = tl.full((ROWS,), 1.0, tl.float32)
    if IS_NORMED:
        square = tl.sum(x * x, 1) / SIZE + eps
        rstd = tl.where(square > 0.0, 1.0 / tl.sqrt(square), 0.0)  # a masked row is all zeros, and eps may be 0
        projection *= rstd
    return rstd, projection


@jit(do_not_specialize=["num_rows", "eps"])
def _score_kernel(
    hidden_ptr, weight_ptr, bias_ptr, score_ptr, rstd_ptr, projection_ptr, num_rows, hidden_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0)
    x = _hidden(hidden_ptr, row, is_row, hidden_stride, SIZE, BLOCK)
    rstd, projection = _project(x, weight, eps, SIZE, ROWS, IS_NORMED)
    tl.store(score_ptr + row, projection + tl.load(bias_ptr), mask=is_row)
    if IS_NORMED:
        tl.store(rstd_ptr + row, rstd, mask=is_row)
        tl.store(projection_ptr + row, projection, mask=is_row)


@jit(do_not_specialize=["clip_range"])
def _sequence_kernel(
    score_ptr, return_ptr, weight_ptr, old_value_ptr, cu_seqlens_ptr, shift_ptr, pull_ptr, clip_range,
    IS_SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """clip(m, +-range) - m of one sequence, and what every value of it gets from the clipped losses because m moves with it."""
    first = tl.load(cu_seqlens_ptr + tl.program_id(0))
    last = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1)
    move = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + row, mask=row < last, other=0.0)
        is_live = weight != 0.0
        value = tl.load(score_ptr + row, mask=is_live, other=0.0)
        if IS_SIGMOID:
            value = tl.sigmoid(value)
        old_value = tl.load(old_value_ptr + row, mask=is_live, other=0.0)
        move += tl.where(is_live, value - old_value, 0.0)
        count += tl.where(is_live, 1.0, 0.0)
    num_live = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(move, 0) / num_live
    shift = tl.minimum(tl.maximum(mean, -clip_range), clip_range) - mean
    pull = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + row, mask=row < last, other=0.0)
        is_live = weight != 0.0
        value = tl.load(score_ptr + row, mask=is_live, other=0.0)
        if IS_SIGMOID:
            value = tl.sigmoid(value)
        error = value - tl.load(return_ptr + row, mask=is_live, other=0.0)
        clipped = error + shift
        pull += tl.where(is_live & (clipped * clipped > error * error), weight * clipped, 0.0)
    # Within the range the shift is 0 and no loss is clipped; beyond it, it falls by 1 / num_live for every unit a value rises.
    pull_of_each = tl.sum(-pull, 0) / num_live
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), tl.float32)
        tl.store(shift_ptr + row, zeros + shift, mask=row < last)
        tl.store(pull_ptr + row, zeros + pull_of_each, mask=row < last)


@jit
def _loss(
    score, target, weight, old_value_ptr, shift_ptr, pull_ptr, row, is_live, clip_range,
    IS_SIGMOID: tl.constexpr, IS_BCE: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """(value, loss, d weight * loss / dscore, whether the clipped loss counts) of each row."""
    value = score
    if IS_SIGMOID:
        value = tl.sigmoid(score)
    error = value - target
    is_clipped = row < 0
    if IS_BCE:
        loss = tl.maximum(score, 0.0) + tl.log(1.0 + exp(-tl.abs(score))) - target * score
        dscore = weight * error
    else:
        counted = error
        dvalue = weight * error
        if CLIP == TOKEN:
            move = value - tl.load(old_value_ptr + row, mask=is_live, other=0.0)
            shift = tl.minimum(tl.maximum(move, -clip_range), clip_range) - move
            clipped = error + shift
            is_clipped = clipped * clipped > error * error
            counted = tl.where(is_clipped, clipped, error)
            dvalue = tl.where(is_clipped, 0.0, dvalue)
        if CLIP == SEQUENCE:
            clipped = error + tl.load(shift_ptr + row, mask=is_live, other=0.0)
            is_clipped = clipped * clipped > error * error
            counted = tl.where(is_clipped, clipped, error)
            dvalue = weight * counted + tl.load(pull_ptr + row, mask=is_live, other=0.0)
        loss = 0.5 * counted * counted
        dscore = dvalue
        if IS_SIGMOID:
            dscore = dvalue * value * (1.0 - value)
    return value, loss, dscore, is_clipped


@jit(do_not_specialize=["num_rows", "share", "first_metric", "clip_range", "eps", "low", "high"])
def _loss_kernel(
    hidden_ptr, weight_ptr, bias_ptr, return_ptr, row_weight_ptr, old_value_ptr, shift_ptr, pull_ptr,
    value_ptr, dscore_ptr, rstd_ptr, projection_ptr, partial_ptr,
    num_rows, share, first_metric, hidden_stride, clip_range, eps, low, high,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NUM_BINS: tl.constexpr, BINS: tl.constexpr,
    IS_NORMED: tl.constexpr, IS_SIGMOID: tl.constexpr, IS_BCE: tl.constexpr, CLIP: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """`share` rows -> value, dscore, and one row of partial[P, K]: du (if needed), db, the metrics, the bins."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    bin_B = tl.arange(0, BINS)
    weight_D = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0)
    bias = tl.load(bias_ptr)
    dweight_D = tl.zeros((BLOCK,), tl.float32)
    count_B = tl.zeros((BINS,), tl.float32)
    value_B = tl.zeros((BINS,), tl.float32)
    return_B = tl.zeros((BINS,), tl.float32)
    dbias = tl.zeros((), tl.float32)
    sum_loss = tl.zeros((), tl.float32)
    sum_value = tl.zeros((), tl.float32)
    sum_abs = tl.zeros((), tl.float32)
    sum_clipped = tl.zeros((), tl.float32)
    sum_weight = tl.zeros((), tl.float32)
    sum_return = tl.zeros((), tl.float32)
    sum_return_square = tl.zeros((), tl.float32)
    sum_error = tl.zeros((), tl.float32)
    sum_error_square = tl.zeros((), tl.float32)
    for start in range(program * share, tl.minimum((program + 1) * share, num_rows), ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < num_rows
        weight = tl.load(row_weight_ptr + row, mask=is_row, other=0.0)
        is_live = weight != 0.0
        x = _hidden(hidden_ptr, row, is_live, hidden_stride, SIZE, BLOCK)
        rstd, projection = _project(x, weight_D, eps, SIZE, ROWS, IS_NORMED)
        target = tl.load(return_ptr + row, mask=is_live, other=0.0)
        value, loss, dscore, is_clipped = _loss(
            projection + bias, target, weight, old_value_ptr, shift_ptr, pull_ptr, row, is_live, clip_range,
            IS_SIGMOID, IS_BCE, CLIP,
        )  # fmt: skip
        if NEEDS_WEIGHT:
            dweight_D += tl.sum(x * (dscore * rstd)[:, None], 0)
            dbias += tl.sum(dscore, 0)
        tl.store(value_ptr + row, tl.where(is_live, value, 0.0), mask=is_row)
        tl.store(dscore_ptr + row, dscore, mask=is_row)
        if IS_NORMED:
            tl.store(rstd_ptr + row, rstd, mask=is_row)
            tl.store(projection_ptr + row, projection, mask=is_row)

        error = target - value
        sum_loss += tl.sum(weight * loss, 0)
        sum_value += tl.sum(weight * value, 0)
        sum_abs += tl.sum(weight * tl.abs(error), 0)
        sum_clipped += tl.sum(tl.where(is_clipped, weight, 0.0), 0)
        sum_weight += tl.sum(weight, 0)
        sum_return += tl.sum(weight * target, 0)
        sum_return_square += tl.sum(weight * target * target, 0)
        sum_error += tl.sum(weight * error, 0)
        sum_error_square += tl.sum(weight * error * error, 0)
        value = tl.minimum(tl.maximum(value, low), high)
        bin_R = tl.minimum(tl.floor((value - low) * (NUM_BINS / (high - low))), NUM_BINS - 1)
        is_in = bin_R[:, None] == bin_B[None, :]
        count_B += tl.sum(tl.where(is_in, weight[:, None], 0.0), 0)
        value_B += tl.sum(tl.where(is_in, (weight * value)[:, None], 0.0), 0)
        return_B += tl.sum(tl.where(is_in, (weight * target)[:, None], 0.0), 0)
    partial_ptr += program.to(tl.int64) * (first_metric + 9 + 3 * NUM_BINS)
    if NEEDS_WEIGHT:
        tl.store(partial_ptr + column, dweight_D, mask=column < SIZE)
        tl.store(partial_ptr + SIZE, dbias)
    partial_ptr += first_metric
    tl.store(partial_ptr, sum_loss)
    tl.store(partial_ptr + 1, sum_value)
    tl.store(partial_ptr + 2, sum_abs)
    tl.store(partial_ptr + 3, sum_clipped)
    tl.store(partial_ptr + 4, sum_weight)
    tl.store(partial_ptr + 5, sum_return)
    tl.store(partial_ptr + 6, sum_return_square)
    tl.store(partial_ptr + 7, sum_error)
    tl.store(partial_ptr + 8, sum_error_square)
    tl.store(partial_ptr + 9 + bin_B, count_B, mask=bin_B < NUM_BINS)
    tl.store(partial_ptr + 9 + NUM_BINS + bin_B, value_B, mask=bin_B < NUM_BINS)
    tl.store(partial_ptr + 9 + 2 * NUM_BINS + bin_B, return_B, mask=bin_B < NUM_BINS)


@jit(do_not_specialize=["num_rows", "share"])
def _backward_kernel(
    hidden_ptr, weight_ptr, dscore_ptr, rstd_ptr, projection_ptr, dhidden_ptr, partial_ptr,
    num_rows, share, hidden_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_NORMED: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """dscore of `share` rows -> dhidden (if needed) and one row of partial[P, D + 1]: du, db (if needed). A row whose dscore is 0
    is not read."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    is_column = column < SIZE
    weight_D = tl.load(weight_ptr + column, mask=is_column, other=0.0)
    dweight_D = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((), tl.float32)
    for start in range(program * share, tl.minimum((program + 1) * share, num_rows), ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < num_rows
        dscore = tl.load(dscore_ptr + row, mask=is_row, other=0.0)
        is_live = dscore != 0.0
        if NEEDS_WEIGHT or IS_NORMED:
            x = _hidden(hidden_ptr, row, is_live, hidden_stride, SIZE, BLOCK)
        slope = dscore
        if IS_NORMED:
            rstd = tl.load(rstd_ptr + row, mask=is_live, other=0.0)
            slope = dscore * rstd
        if NEEDS_WEIGHT:
            dweight_D += tl.sum(x * slope[:, None], 0)  # pyright: ignore[reportPossiblyUnboundVariable]
            dbias += tl.sum(dscore, 0)
        if NEEDS_HIDDEN:
            dhidden = slope[:, None] * weight_D[None, :]
            if IS_NORMED:
                projection = tl.load(projection_ptr + row, mask=is_live, other=0.0)
                dhidden -= x * (slope * rstd * projection / SIZE)[:, None]  # pyright: ignore[reportPossiblyUnboundVariable]
            pointer = dhidden_ptr + row.to(tl.int64)[:, None] * SIZE + column[None, :]
            tl.store(pointer, rounded(dhidden, dhidden_ptr), mask=is_row[:, None] & is_column[None, :])
    if NEEDS_WEIGHT:
        partial_ptr += program.to(tl.int64) * (SIZE + 1)
        tl.store(partial_ptr + column, dweight_D, mask=is_column)
        tl.store(partial_ptr + SIZE, dbias)


@jit(do_not_specialize=["num_rows", "num_columns"])
def _sum_kernel(partial_ptr, sum_ptr, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the rows of partial[P, K], always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        total += tl.sum(tl.load(partial_ptr + row[:, None] * num_columns + column[None, :], mask=mask, other=0.0), 0)
    tl.store(sum_ptr + column, total, mask=column < num_columns)


class _Tile(NamedTuple):
    """Rows of hidden states that a program holds in registers at a time."""

    block: int
    rows: int
    num_warps: int

    def share(self, num_rows: int) -> tuple[int, int]:
        """(programs, rows of each)."""
        tiles = -(-num_rows // self.rows)
        tiles_of_each = max(-(-tiles // PROGRAMS), 1)
        return -(-tiles // tiles_of_each), tiles_of_each * self.rows


def _tile(size: int) -> _Tile:
    """Compiled ahead of time, 32 numbers per thread leave no register spilled; up to 32 rows, so that few rows still fill a GPU."""
    block = 1 << (size - 1).bit_length()
    return _Tile(block, min(MAX_HIDDEN_SIZE // block, 32), num_warps=8)


def _sum_rows(partial_PK: Tensor) -> Tensor:
    total_K = torch.empty_like(partial_PK[0]) if len(partial_PK) else partial_PK.new_zeros(partial_PK.shape[1])
    launch(
        _sum_kernel, -(-len(total_K) // 64) if len(partial_PK) else 0, partial_PK, total_K, *partial_PK.shape,
        ROWS=32, COLUMNS=64,
    )  # fmt: skip
    return total_K


def score_triton(
    hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(score, r, c); without a norm there are no r and c."""
    num_rows, size = hidden_ND.shape
    tile = _tile(size)
    score_N = torch.empty(num_rows, dtype=torch.float32, device=hidden_ND.device)
    rstd_N, projection_N = (None, None) if eps is None else (torch.empty_like(score_N), torch.empty_like(score_N))
    launch(
        _score_kernel, -(-num_rows // tile.rows), hidden_ND, weight_D, bias, score_N,
        score_N if rstd_N is None else rstd_N, score_N if projection_N is None else projection_N, num_rows,
        hidden_ND.stride(0), eps or 0.0, SIZE=size, BLOCK=tile.block, ROWS=tile.rows, IS_NORMED=eps is not None,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return score_N, rstd_N, projection_N


def loss_triton(
    hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, return_N: Tensor, weight_N: Tensor, old_value_N: Tensor | None,
    cu_seqlens_S1: Tensor | None, eps: float | None, terms: Terms, needs_weight: bool,
) -> LossResult:  # fmt: skip
    """Everything about the loss and, for an upstream gradient of 1, dscore and the gradients of weight and bias."""
    num_rows, size = hidden_ND.shape
    tile = _tile(size)
    num_programs, share = tile.share(num_rows)
    shift_N = pull_N = weight_N
    if terms.clip == "sequence_mean":
        assert old_value_N is not None
        assert cu_seqlens_S1 is not None
        # zeros: rows after the last sequence are not clipped
        shift_N, pull_N = torch.zeros_like(weight_N), torch.zeros_like(weight_N)
        launch(
            _sequence_kernel, len(cu_seqlens_S1) - 1, score_triton(hidden_ND, weight_D, bias, eps)[0], return_N,
            weight_N, old_value_N, cu_seqlens_S1.contiguous(), shift_N, pull_N, terms.clip_range,
            IS_SIGMOID=terms.head == "sigmoid", BLOCK=1024,
        )  # fmt: skip
    value_N, dscore_N = torch.empty_like(weight_N), torch.empty_like(weight_N)
    rstd_N, projection_N = (None, None) if eps is None else (torch.empty_like(weight_N), torch.empty_like(weight_N))
    first_metric = size + 1 if needs_weight else 0
    partial_PK = torch.empty(
        num_programs, first_metric + NUM_METRICS + 3 * terms.num_bins, dtype=torch.float32, device=hidden_ND.device
    )
    launch(
        _loss_kernel, num_programs, hidden_ND, weight_D, bias, return_N, weight_N,
        weight_N if old_value_N is None else old_value_N, shift_N, pull_N, value_N, dscore_N,
        value_N if rstd_N is None else rstd_N, value_N if projection_N is None else projection_N, partial_PK,
        num_rows, share, first_metric, hidden_ND.stride(0), terms.clip_range, eps or 0.0, *terms.value_range,
        SIZE=size, BLOCK=tile.block, ROWS=tile.rows, NUM_BINS=terms.num_bins,
        BINS=1 << (terms.num_bins - 1).bit_length(), IS_NORMED=eps is not None, **terms.constants,
        NEEDS_WEIGHT=needs_weight, num_warps=tile.num_warps,
    )  # fmt: skip
    total_K = _sum_rows(partial_PK)
    dweight_D, dbias = (total_K[:size], total_K[size]) if needs_weight else (None, None)
    metrics, bins = total_K[first_metric:].split([NUM_METRICS, 3 * terms.num_bins])
    return LossResult(
        metrics, value_N, bins.reshape(3, terms.num_bins), dscore_N, rstd_N, projection_N, dweight_D, dbias
    )


def backward_triton(
    hidden_ND: Tensor | None, weight_D: Tensor, dscore_N: Tensor, rstd_N: Tensor | None, projection_N: Tensor | None, *,
    like: Tensor, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden (in the dtype of `like`), weight and bias; without a norm that of hidden never looks at hidden."""
    num_rows, size = len(dscore_N), len(weight_D)
    tile = _tile(size)
    num_programs, share = tile.share(num_rows)
    dhidden_ND = torch.empty(num_rows, size, dtype=like.dtype, device=like.device) if needs_hidden else None
    partial_PK = dscore_N.new_empty(num_programs, size + 1) if needs_weight else None
    launch(
        _backward_kernel, num_programs, dscore_N if hidden_ND is None else hidden_ND, weight_D, dscore_N,
        dscore_N if rstd_N is None else rstd_N, dscore_N if projection_N is None else projection_N,
        dscore_N if dhidden_ND is None else dhidden_ND, dscore_N if partial_PK is None else partial_PK,
        num_rows, share, 0 if hidden_ND is None else hidden_ND.stride(0), SIZE=size, BLOCK=tile.block, ROWS=tile.rows,
        IS_NORMED=rstd_N is not None, NEEDS_HIDDEN=needs_hidden, NEEDS_WEIGHT=needs_weight, num_warps=tile.num_warps,
    )  # fmt: skip
    if partial_PK is None:
        return dhidden_ND, None, None
    total_K = _sum_rows(partial_PK)
    return dhidden_ND, total_K[:size], total_K[size]
