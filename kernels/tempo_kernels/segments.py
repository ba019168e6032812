"""Ragged rows in packed storage: S segments laid end to end, bounded by cu_seqlens_S1 = [0, len_0, len_0 + len_1, ...]."""

# Shape letters: T = packed elements, S = segments, S1 = S + 1 boundaries
import torch
from torch import Tensor


def segment_lengths(cu_seqlens_S1: Tensor) -> Tensor:
    """Length of each segment, [S] int64.

    Raises ValueError when the boundaries do not start at 0 or when they decrease.
    """
    is_vector = cu_seqlens_S1.ndim == 1 and len(cu_seqlens_S1) > 0
    length_S = cu_seqlens_S1.diff() if is_vector else cu_seqlens_S1
    if not is_vector or cu_seqlens_S1[0] != 0 or (length_S < 0).any():
        raise ValueError(
            f"cu_seqlens must be a vector that starts at 0 and never decreases, got {cu_seqlens_S1.tolist()[:8]}"
        )
    return length_S


def segment_ids(cu_seqlens_S1: Tensor) -> Tensor:
    """The segment each packed element belongs to, [T] int64: cu_seqlens [0, 2, 2, 3] gives [0, 0, 2]."""
    length_S = segment_lengths(cu_seqlens_S1)
    return torch.arange(len(length_S), device=cu_seqlens_S1.device).repeat_interleave(length_S)


def segment_sum(x_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """Sum of x over each segment, [S]; 0 for an empty segment. Fixed order, so the same bits every time."""
    return torch.segment_reduce(x_T, "sum", offsets=cu_seqlens_S1, initial=0)


def segment_mean(x_T: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """Mean of x over each segment, [S]; 0 for an empty segment."""
    return segment_sum(x_T, cu_seqlens_S1) / segment_lengths(cu_seqlens_S1).clamp(min=1)


def ranges(start_S: Tensor, length_S: Tensor) -> Tensor:
    """start_s, start_s + 1, ... for length_s entries, one range after another: starts [5, 0] of lengths [2, 1] give [5, 6, 0]."""
    end_S = length_S.cumsum(0)
    shift_S = start_S - (end_S - length_S)
    return torch.arange(int(length_S.sum()), device=start_S.device) + shift_S.repeat_interleave(length_S)


def segment_index(cu_seqlens_S1: Tensor, rows: Tensor) -> Tensor:
    """Positions in packed storage of the chosen segments, in the order of `rows`, [T'] int64."""
    return ranges(cu_seqlens_S1[:-1][rows], segment_lengths(cu_seqlens_S1)[rows])


def boundaries(length_S: Tensor) -> Tensor:
    """cu_seqlens of segments with these lengths, [S + 1] int64."""
    return torch.cat([length_S.new_zeros(1), length_S.cumsum(0)])
