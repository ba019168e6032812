"""GAE-free advantages over packed sequences (TEMPO, arXiv 2604.19295, eq. 11) and their whitening.

A response of T_i tokens has T_i + 1 values: V(x, y_<t) before each token t, which is an action-independent baseline, and
V(x, y_T) after the last one, EOS included. With an outcome R_i per sequence, the advantage of token t is A_t = R_i - V(x, y_<t).
"""

# Shape letters: T = packed response tokens, S = sequences, TS = T + S values (one more than tokens in each sequence)
import torch
from torch import Tensor

from tempo_kernels.segments import segment_ids, segment_lengths


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
    terminal_index_S = cu_seqlens_S1[1:] + torch.arange(num_sequences, device=value_TS.device)
    is_baseline_TS = torch.ones_like(value_TS, dtype=torch.bool)
    is_baseline_TS[terminal_index_S] = False
    return value_TS[is_baseline_TS], value_TS[terminal_index_S]


def advantage(outcome_S: Tensor, value_TS: Tensor, cu_seqlens_S1: Tensor) -> Tensor:
    """A_t = R - V(x, y_<t) for every token t of a sequence with outcome R, [T] float32.

    TEMPO, arXiv 2604.19295, eq. 11 (with the action-independent baseline y_<t). When R is the verified label this equals
    generalised advantage estimation with gamma = lambda = 1 and the reward on the last token.

    Args:
        outcome_S: outcome of each sequence: the label, or the critic's terminal value.
        value_TS: T + 1 values per sequence, packed.
        cu_seqlens_S1: boundaries of the responses, [S + 1] int64.

    Raises:
        ValueError: the shapes do not belong together.
    """
    baseline_T, _ = split_values(value_TS, cu_seqlens_S1)
    if len(outcome_S) != len(cu_seqlens_S1) - 1:
        raise ValueError(f"want one outcome per sequence ({len(cu_seqlens_S1) - 1}), got {len(outcome_S)}")
    return outcome_S.float()[segment_ids(cu_seqlens_S1)] - baseline_T.float()


def whiten(advantage_T: Tensor, population_T: Tensor, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(var + eps), with mean and (unbiased) variance taken over each population by itself, [T] float32.

    `population_T` holds a small integer per token (all zeros: one population). With `center=False` A is only divided by its
    scale, sqrt(mean(A^2) + eps), which keeps its sign. Statistics are float64. A population of one token is centred to 0.
    """
    out_T = torch.empty_like(advantage_T, dtype=torch.float32)
    for population in population_T.unique().tolist():
        rows = population_T == population
        x = advantage_T[rows].double()
        if center:
            var = x.var() if len(x) > 1 else x.new_ones(())
            x = x - x.mean()
        else:
            # About zero, not about the mean: advantages that hardly differ must not blow up.
            var = (x**2).mean()
        out_T[rows] = (x / (var + eps).sqrt()).float()
    return out_T


def group_advantage(outcome_S: Tensor, group_S: Tensor, *, divide_by_std: bool, eps: float = 1e-6) -> Tensor:
    """GRPO's baseline: (R - mean of its group) [/ (std of its group + eps)], [S] float32 (arXiv 2402.03300, eq. 9).

    `group_S` numbers the groups 0 .. G-1. The standard deviation is unbiased; a group of one gets 0.
    """
    outcome_S = outcome_S.double()
    num_groups = int(group_S.max()) + 1 if len(group_S) else 0
    zero_G = outcome_S.new_zeros(num_groups)
    count_G = zero_G.index_add(0, group_S, torch.ones_like(outcome_S))
    mean_G = zero_G.index_add(0, group_S, outcome_S) / count_G.clamp(min=1)
    centred_S = outcome_S - mean_G[group_S]
    if divide_by_std:
        var_G = zero_G.index_add(0, group_S, centred_S**2) / (count_G - 1).clamp(min=1)
        centred_S = centred_S / (var_G.sqrt()[group_S] + eps)
    return centred_S.float()
