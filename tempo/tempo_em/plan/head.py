"""What `tempo_kernels.linear_logprob` needs beside hidden states and head: blocks of logits, statistics, gradients."""

# Shape letters: T = response tokens, D = hidden size, V = vocabulary
from typing import NamedTuple

# The numbers of `tempo_kernels.linear_logprob`, which would import torch; a test holds them together.
CPU_MAX_BYTES, GPU_MAX_BYTES = 80 * 2**20, 512 * 2**20
MIN_ROWS, MIN_COLUMNS = 256, 512
CPU_COLUMNS, GPU_KEPT_COLUMNS = 8192, 16384
# On a CPU, logits are worked on in float32, so many at a time, with room for as many numbers.
SCRATCH_ELEMENTS = 64 * 8192
PART_COLUMNS = 128  # on a GPU, three float32 statistics for each so many logits


class Cut(NamedTuple):
    """How the [T, V] logits are cut: a block has at most `num_rows` rows and `num_columns` columns."""

    is_stored: bool
    num_rows: int
    num_columns: int


def cut(num_tokens: int, vocab_size: int, itemsize: int, *, is_gpu: bool) -> Cut:
    """STORE, SLAB or NOBUF, as the op decides it under its default budget."""
    budget = GPU_MAX_BYTES if is_gpu else CPU_MAX_BYTES
    most = -(-vocab_size // MIN_COLUMNS) * MIN_COLUMNS
    most = most if is_gpu else min(most, CPU_COLUMNS)
    if num_tokens * vocab_size * itemsize <= budget:
        return Cut(True, max(num_tokens, 1), min(most, GPU_KEPT_COLUMNS))
    columns = min(max(budget // (num_tokens * itemsize) // MIN_COLUMNS, 1) * MIN_COLUMNS, most)
    return Cut(False, min(max(budget // (columns * itemsize), MIN_ROWS), num_tokens), columns)


def head_forward(T: int, D: int, V: int, itemsize: int, *, is_gpu: bool) -> float:
    """Bytes of a pass without gradients: gathered hidden states, and one block of logits, or their statistics."""
    blocks = cut(T, V, itemsize, is_gpu=is_gpu)
    block = 12.0 * T * -(-V // PART_COLUMNS) if is_gpu else itemsize * blocks.num_rows * min(blocks.num_columns, V)
    return itemsize * T * D + block + (0 if is_gpu else _scratch(blocks, V))


def head_backward(T: int, D: int, V: int, itemsize: int, *, is_gpu: bool) -> float:
    """Bytes when the backward begins, beside the head's own gradient: hidden states (and a copy of those that get a gradient, when
    clipping leaves some out), logits kept or computed again, hidden's gradient in float32 and in its dtype."""
    blocks = cut(T, V, itemsize, is_gpu=is_gpu)
    logits = T * V if blocks.is_stored else blocks.num_rows * min(blocks.num_columns, V)
    gradient = max(itemsize, 4) + (itemsize if itemsize < 4 else 0)
    columns = 0 if blocks.num_rows >= T else 4 * blocks.num_columns * D
    return (2 * itemsize + gradient) * T * D + itemsize * logits + columns + (0 if is_gpu else _scratch(blocks, V))


def _scratch(blocks: Cut, V: int) -> float:
    return 2 * 4 * min(SCRATCH_ELEMENTS, blocks.num_rows * min(blocks.num_columns, V))
