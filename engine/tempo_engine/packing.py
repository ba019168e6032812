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


@dataclass(frozen=True)
class PackedBatch:
    """S sequences end to end.

    With prompt (5, 9) and response (7, 2): input_ids_N = [5, 9, 7, 2], target_T = [7, 2]; the log-probs are read at positions
    [1, 2] (each position predicts the next token), the T + 1 values at positions [1, 2, 3] (before each token, and after the last).
    """

    input_ids_N: Tensor
    cu_seqlens_S1: Tensor
    cu_responses_S1: Tensor
    sampler_logprob_T: Tensor

    def __len__(self) -> int:
        return len(self.cu_seqlens_S1) - 1

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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

    def padded(self) -> tuple[Tensor, Tensor]:
        """The tokens as a rectangle, [B, L] padded on the right, and where each packed position lies in its flattened form, [N].

        Right padding comes after every real token, so causal attention needs no mask for it.
        """
        longest = int(self.length_S.max())
        index_N = segment_ids(self.cu_seqlens_S1) * longest + self.position_N
        ids = self.input_ids_N.new_zeros(len(self) * longest)
        ids[index_N] = self.input_ids_N
        return ids.view(len(self), longest), index_N

    def select(self, rows: Tensor) -> "PackedBatch":
        """The chosen sequences, in the order of `rows`."""
        return PackedBatch(
            self.input_ids_N[segment_index(self.cu_seqlens_S1, rows)],
            boundaries(self.length_S[rows]),
            boundaries(self.response_length_S[rows]),
            self.sampler_logprob_T[segment_index(self.cu_responses_S1, rows)],
        )


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass. Where `counts` is false, this rank has no rows left and computes along with the
    others, on a row whose result must weigh nothing: gathering weights takes all ranks."""

    rows: Tensor
    counts: bool
    is_last: bool


def micro_batches(batch: PackedBatch, rows: Tensor | None, max_tokens: int, *, is_packed: bool) -> list[MicroBatch]:
    """This rank's share of the chosen rows (None: all), in parts of at most `max_tokens` tokens (or one sequence).

    Ranks get nearly equal numbers of tokens, and all of them the same number of parts. Longest first: memory peaks at once, not
    later, and neighbours have similar lengths. What counts is each part padded to its longest sequence, unless `is_packed`.
    """
    rows = torch.arange(len(batch), device=batch.cu_seqlens_S1.device) if rows is None else rows
    length = batch.length_S[rows].tolist()
    parts = (_packed_parts if is_packed else _padded_parts)(length, max_tokens)
    mine = parts[parallel.rank()]
    rounds = max(map(len, parts), default=0)
    idle = [[length.index(min(length))]] * (rounds - len(mine)) if length else []
    return [
        MicroBatch(rows[torch.tensor(part, device=rows.device)], i < len(mine), i == rounds - 1)
        for i, part in enumerate([*mine, *idle])
    ]


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
    prompt_length_S = torch.tensor([len(r.prompt.token_ids) for r in rollouts])
    return PackedBatch(
        torch.tensor(ids, device=device),
        boundaries(prompt_length_S + response_length_S).to(device),
        boundaries(response_length_S).to(device),
        torch.tensor([p for r in rollouts for p in r.logprobs], dtype=torch.float32, device=device),
    )
