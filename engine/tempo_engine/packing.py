"""Rollouts -> one packed batch: sequences end to end, no padding, with the positions where log-probs and values are read."""

# Shape letters: N = packed tokens (prompts and responses), T = packed response tokens, S = sequences, S1 = S + 1,
# TS = T + S values, BL = sequences padded on the right to a rectangle
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from tempo_kernels.segments import boundaries, ranges, segment_ids, segment_index, segment_lengths
from torch import Tensor

from tempo_engine import parallel
from tempo_engine.rollout import Rollout
from tempo_engine.trees import Trees, group_rows, plant, tree_size


@dataclass(frozen=True)
class PackedBatch:
    """S sequences end to end.

    With prompt (5, 9) and response (7, 2): input_ids_N = [5, 9, 7, 2], target_T = [7, 2]; the log-probs are read at positions
    [1, 2] (each position predicts the next token), the T + 1 values at positions [1, 2, 3] (before each token, and after the last).

    `prompt_S` has the same number for sequences with the same prompt. `cu_trees`, boundaries in sequences: those between two of
    them are computed as one tree (trees.py); None: every sequence by itself.
    """

    input_ids_N: Tensor
    cu_seqlens_S1: Tensor
    cu_responses_S1: Tensor
    sampler_logprob_T: Tensor
    prompt_S: Tensor
    cu_trees: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens_S1) - 1

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    @cached_property
    def length_S(self) -> Tensor:
        return segment_lengths(self.cu_seqlens_S1)

    @cached_property
    def response_length_S(self) -> Tensor:
        return segment_lengths(self.cu_responses_S1)

    @cached_property
    def response_index_T(self) -> Tensor:
        """Positions of the response tokens."""
        return ranges(self.cu_seqlens_S1[1:] - self.response_length_S, self.response_length_S)

    @property
    def target_T(self) -> Tensor:
        return self.input_ids_N[self.response_index_T]

    @property
    def logprob_index_T(self) -> Tensor:
        """Positions whose hidden state predicts each response token."""
        return self.response_index_T - 1

    @cached_property
    def value_index_TS(self) -> Tensor:
        """Positions whose hidden state is read as V(x, y_<t), and after the last token as V(x, y_T)."""
        return ranges(self.cu_seqlens_S1[1:] - self.response_length_S - 1, self.response_length_S + 1)

    @cached_property
    def cu_values_S1(self) -> Tensor:
        return boundaries(self.response_length_S + 1)

    @cached_property
    def position_N(self) -> Tensor:
        """Position of each packed token in its own sequence: 0, 1, ... and 0 again where the next one starts."""
        sequence_N = segment_ids(self.cu_seqlens_S1)
        return torch.arange(len(self.input_ids_N), device=sequence_N.device) - self.cu_seqlens_S1[sequence_N]

    def trees(self) -> Trees:
        """The tokens as trees. Only where `cu_trees` says which."""
        assert self.cu_trees is not None
        sequence_N = segment_ids(self.cu_seqlens_S1)
        rows = (self.length_S, self.response_length_S)
        return plant(self.input_ids_N, self.position_N, sequence_N, *rows, self.cu_trees)

    def padded(self) -> tuple[Tensor, Tensor]:
        """The tokens as a rectangle, [B, L] padded on the right, and where each packed position lies in its flattened form, [N].

        Right padding comes after every real token, so causal attention needs no mask for it.
        """
        longest = int(self.length_S.max())
        index_N = segment_ids(self.cu_seqlens_S1) * longest + self.position_N
        ids = self.input_ids_N.new_zeros(len(self) * longest)
        ids[index_N] = self.input_ids_N
        return ids.view(len(self), longest), index_N

    def select(self, rows: Tensor, cu_trees: Tensor | None = None) -> "PackedBatch":
        """The chosen sequences, in the order of `rows`; as trees, if `cu_trees` says which of them are one."""
        return PackedBatch(
            self.input_ids_N[segment_index(self.cu_seqlens_S1, rows)],
            boundaries(self.length_S[rows]),
            boundaries(self.response_length_S[rows]),
            self.sampler_logprob_T[segment_index(self.cu_responses_S1, rows)],
            self.prompt_S[rows],
            cu_trees,
        )


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass, and which of them are a tree. Where `counts` is false, this rank has no rows left and
    computes along with the others, on rows whose result must weigh nothing: gathering weights takes all ranks."""

    rows: Tensor
    cu_trees: Tensor | None
    counts: bool
    is_last: bool

    def of(self, batch: PackedBatch) -> PackedBatch:
        return batch.select(self.rows, self.cu_trees)


def micro_batches(
    batch: PackedBatch, rows: Tensor | None, max_tokens: int, *, is_packed: bool, tree_width: int | None = None
) -> list[MicroBatch]:
    """This rank's share of the chosen rows (None: all), in parts of at most `max_tokens` tokens (or one sequence).

    Ranks get nearly equal numbers of tokens, and all of them the same number of parts. Longest first: memory peaks at once, not
    later, and neighbours have similar lengths. What counts is each part padded to its longest sequence, unless `is_packed`.
    With a `tree_width`, the model's hidden size, rows with the same prompt are trees where that pays, and a tree is what a row is.
    """
    rows = torch.arange(len(batch), device=batch.cu_seqlens_S1.device) if rows is None else rows
    length = batch.length_S[rows].tolist()
    prompt_length = (batch.length_S - batch.response_length_S)[rows].tolist()
    units = [[row] for row in range(len(length))]
    if tree_width is not None:
        units = group_rows(batch.prompt_S[rows].tolist(), prompt_length, length, max_tokens, tree_width)
    size = [tree_size(unit, prompt_length, length) for unit in units]
    parts = (_packed_parts if is_packed else _padded_parts)(size, max_tokens)
    mine = parts[parallel.rank()]
    rounds = max(map(len, parts), default=0)
    idle = [[size.index(min(size))]] * (rounds - len(mine)) if size else []
    return [
        _micro_batch(rows, [units[unit] for unit in part], i < len(mine), i == rounds - 1)
        for i, part in enumerate([*mine, *idle])
    ]


def _micro_batch(rows: Tensor, units: list[list[int]], counts: bool, is_last: bool) -> MicroBatch:
    chosen = torch.tensor([row for unit in units for row in unit], device=rows.device)
    size_B = torch.tensor([len(unit) for unit in units], device=rows.device)
    cu_trees = boundaries(size_B) if len(chosen) > len(units) else None
    return MicroBatch(rows[chosen], cu_trees, counts, is_last)


def _packed_parts(length: list[int], max_tokens: int) -> list[list[list[int]]]:
    """Each rank's parts when nothing is padded: any rows with as many tokens as the other ranks'."""
    return [_cut(_longest_first(share, length), length, max_tokens, True) for share in parallel.divide(length)]


def _padded_parts(length: list[int], max_tokens: int) -> list[list[list[int]]]:
    """Each rank's parts when rows are padded to the longest of their part: runs of the rows in order of length, dealt in turn.

    Were rows dealt to ranks one by one, each rank's neighbours would differ more in length, and every rank would pad more. The
    budget is lowered as far as the number of rounds allows, so that the ranks' parts of a round are equally large.
    """
    ranks, order = parallel.world_size(), _longest_first(range(len(length)), length)
    parts = _cut(order, length, max_tokens, False)
    if ranks > 1:
        most = -(-len(parts) // ranks) * ranks
        budget = bisect_left(range(max_tokens), -most, key=lambda tokens: -len(_cut(order, length, tokens, False)))
        parts = _cut(order, length, budget, False)
    return [parts[rank::ranks] for rank in range(ranks)]


def _longest_first(share: Iterable[int], length: list[int]) -> list[int]:
    return sorted(share, key=lambda index: -length[index])


def _cut(order: list[int], length: list[int], max_tokens: int, is_packed: bool) -> list[list[int]]:
    parts: list[list[int]] = []
    size = 0
    for index in order:
        # The first of a part is its longest: what all are padded to.
        size += length[index] if is_packed or not parts else length[parts[-1][0]]
        if not parts or size > max_tokens:
            parts.append([])
            size = length[index]
        parts[-1].append(index)
    return parts


def pack(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay rollouts end to end, in order.

    Raises ValueError for an empty prompt: nothing would predict its first token.
    """
    for rollout in rollouts:
        if not rollout.prompt.token_ids:
            raise ValueError(f"the prompt {rollout.prompt.id} has no tokens")
    ids = [token for r in rollouts for token in (*r.prompt.token_ids, *r.response_ids)]
    response_length_S = torch.tensor([len(r.response_ids) for r in rollouts])
    number: dict[tuple[int, ...], int] = {}
    prompt_length_S = torch.tensor([len(r.prompt.token_ids) for r in rollouts])
    return PackedBatch(
        torch.tensor(ids, device=device),
        boundaries(prompt_length_S + response_length_S).to(device),
        boundaries(response_length_S).to(device),
        torch.tensor([p for r in rollouts for p in r.logprobs], dtype=torch.float32, device=device),
        torch.tensor([number.setdefault(r.prompt.token_ids, len(number)) for r in rollouts], device=device),
    )
