"""Responses to one prompt as one tree-shaped sequence: the prompt is computed once, its responses side by side behind it.

    prompt 5 9, responses 7 2 and 3        5 9 | 7 2 | 3        positions 0 1 | 2 3 | 2

A mask lets each response see the prompt and itself, so hidden states, and gradients, are those of separate sequences to round-off.
What is saved are the prompt's copies; what is paid is attention that cannot skip pairs which the mask forbids.
"""

# Shape letters: N = packed tokens, S = sequences, BL = trees padded on the right to a rectangle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tempo_kernels.segments import segment_ids, segment_sum
from torch import Tensor

# Copies of shorter prompts cost less than the masks do.
SHORTEST_PROMPT = 64


@dataclass(frozen=True)
class Trees:
    """Trees as a rectangle. `index_N`: where each packed token lies in its flattened form; copies of a prompt lie at one place.

    `sees_BLL`: which tokens may attend to which.
    """

    ids_BL: Tensor
    position_BL: Tensor
    sees_BLL: Tensor
    index_N: Tensor

    def inputs(self, attention: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """As transformers' models take them. Eager attention adds its mask to the scores, others want to know what is seen."""
        mask = self.sees_BLL[:, None]
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": self.ids_BL, "position_ids": self.position_BL, "attention_mask": mask}


def plant(
    input_ids_N: Tensor,
    position_N: Tensor,
    sequence_N: Tensor,
    length_S: Tensor,
    response_length_S: Tensor,
    cu_trees: Tensor,
) -> Trees:
    """Sequences end to end -> trees. `cu_trees` are boundaries in sequences: those between two of them have the same prompt."""
    tree_S = segment_ids(cu_trees)
    prompt_length_S = length_S - response_length_S
    before_S = response_length_S.cumsum(0) - response_length_S
    offset_S = before_S - before_S[cu_trees[:-1]][tree_S]  # of a response behind its prompt
    size_B = prompt_length_S[cu_trees[:-1]] + segment_sum(response_length_S.double(), cu_trees).long()
    longest = int(size_B.max())
    is_response_N = position_N >= prompt_length_S[sequence_N]
    index_N = tree_S[sequence_N] * longest + position_N + offset_S[sequence_N] * is_response_N

    def laid_out(x_N: Tensor, elsewhere: int) -> Tensor:
        return x_N.new_full((len(size_B) * longest,), elsewhere).index_copy(0, index_N, x_N).view(len(size_B), longest)

    branch_BL = laid_out((sequence_N + 1) * is_response_N, -1)  # 0: the prompt, -1: padding
    query_BL1, key_B1L = branch_BL[:, :, None], branch_BL[:, None, :]
    # Padding sees itself and the prompt, so no row of the mask is empty; nothing sees padding.
    sees_BLL = ((key_B1L == 0) | (key_B1L == query_BL1)).tril()
    return Trees(laid_out(input_ids_N, 0), laid_out(position_N, 0), sees_BLL, index_N)


def group_rows(
    prompt: Sequence[int], prompt_length: Sequence[int], length: Sequence[int], max_tokens: int, width: int
) -> list[list[int]]:
    """Rows that are computed as one tree each: those with the same prompt, as many together as pays.

    `prompt` says which rows have the same one. Trees have at most `max_tokens` tokens; `width` is the model's hidden size.
    """
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(prompt):
        groups.setdefault(number, []).append(row)
    found: list[list[int]] = []
    for rows in groups.values():
        shared = prompt_length[rows[0]]
        mean = sum(length[row] for row in rows) / len(rows) - shared
        parts = -(-len(rows) // _best_size(shared, mean, len(rows), max_tokens, width))
        rows.sort(key=lambda row: -length[row])  # dealt in turn, parts are of about one size
        found += [rows[part::parts] for part in range(parts)]
    return found


def tree_size(tree: Sequence[int], prompt_length: Sequence[int], length: Sequence[int]) -> int:
    """Tokens of a tree of these rows."""
    shared = prompt_length[tree[0]]
    return shared + sum(length[row] - shared for row in tree)


def _best_size(prompt: int, response: float, count: int, max_tokens: int, width: int) -> int:
    """How many of `count` responses make the cheapest tree.

    Of a transformer block: about 24 width^2 operations a token, 4 width for each pair of attention. A sequence alone computes the
    causal half of its pairs.
    """
    if prompt < SHORTEST_PROMPT:
        return 1

    def cost(size: int) -> float:
        tokens = prompt + size * response
        pairs = tokens**2 / (2 if size == 1 else 1)
        return (6 * width * tokens + pairs) / size

    return min((size for size in range(1, count + 1) if size == 1 or prompt + size * response <= max_tokens), key=cost)


def can_plant(config: Any) -> bool:
    """Whether a model's attention takes masks of any shape: FlashAttention does not. Whether it heeds them, a trial says."""
    return config._attn_implementation in ("eager", "sdpa")


def window_of(config: Any) -> float:
    """Tokens that the narrowest layer looks back on: rows that are longer cannot be in a tree, whose mask knows no windows."""
    layers = getattr(config, "layer_types", None)
    if layers is not None and set(layers) == {"full_attention"}:
        return float("inf")
    return getattr(config, "sliding_window", None) or float("inf")
