"""What each op must at least compute and move, and the time a GPU needs for that: a floor no implementation can beat.

Counts follow the algorithms in this package, in the units of the hardware: floating-point operations of matrix products (a
product of [M, K] and [K, N] is 2 M N K) and bytes between GPU memory and the processors, every input read and every output
written once per pass.
"""

# Shape letters: T = packed response tokens, D = hidden size, V = vocabulary, S = sequences
from typing import Literal, NamedTuple

Mode = Literal["STORE", "SLAB", "NOBUF"]


class Cost(NamedTuple):
    """Operations, bytes moved, and bytes of memory beyond inputs and outputs."""

    flops: float
    bytes_moved: float
    memory: float

    def __add__(self, other: tuple[float, ...]) -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        flops, bytes_moved, memory = other
        return Cost(self.flops + flops, self.bytes_moved + bytes_moved, max(self.memory, memory))


class Gpu(NamedTuple):
    """Peak rates from the vendor's data sheet: dense bfloat16 operations and bytes per second."""

    name: str
    flops: float
    bandwidth: float

    def floor_ms(self, cost: Cost) -> float:
        """Milliseconds when products and transfers overlap perfectly."""
        return 1e3 * max(cost.flops / self.flops, cost.bytes_moved / self.bandwidth)


GPUS = (
    Gpu("A100", 312e12, 2.04e12),
    Gpu("H100", 989e12, 3.35e12),
    Gpu("H200", 989e12, 4.8e12),
    Gpu("B200", 2250e12, 8.0e12),
    Gpu("MI300X", 1307e12, 5.3e12),
)
H100 = GPUS[1]
PART_COLUMNS = 128  # of linear_logprob's statistics


def linear_logprob_forward(T: int, D: int, V: int, *, itemsize: int = 2, mode: Mode = "SLAB") -> Cost:
    """One product; head and hidden read once; 12 bytes of statistics per 128 logits, written and read; STORE writes the logits."""
    statistics = 12.0 * T * -(-V // PART_COLUMNS)
    kept = itemsize * T * V if mode == "STORE" else 0
    return Cost(2.0 * T * D * V, itemsize * (T + V) * D + 2 * statistics + kept, statistics + kept)


def linear_logprob_backward(
    T: int, D: int, V: int, *, itemsize: int = 2, mode: Mode = "SLAB", max_bytes: int = 2**29
) -> Cost:
    """Two products, and a third where logits are computed again; gradients of logits are written once and read twice, hidden's
    gradient is added up in float32 once per slab, head's is written once (NOBUF: added up in float32 per block of tokens)."""
    columns = V if mode == "STORE" else max(max_bytes // (T * itemsize) // 512, 1) * 512
    rows = T if mode != "NOBUF" else max(max_bytes // (columns * itemsize), 1)
    products = 2 if mode == "STORE" else 3
    reads = products * itemsize * (T + V) * D
    logits = (4 if mode == "STORE" else 3) * itemsize * T * V
    d_hidden = 8.0 * T * D * -(-V // columns)
    d_head = itemsize * V * D if mode != "NOBUF" else 8.0 * V * D * -(-T // rows)
    block = 0 if mode == "STORE" else itemsize * rows * min(columns, V)
    return Cost(products * 2.0 * T * D * V, reads + logits + d_hidden + d_head, block + 4.0 * T * D)


def gather_logprob_forward(T: int, V: int, *, itemsize: int = 2) -> Cost:
    """Logits read once."""
    return Cost(0, itemsize * T * V, 0)


def gather_logprob_backward(T: int, V: int, *, itemsize: int = 2) -> Cost:
    """Logits read, their gradient written; in place it needs no memory."""
    return Cost(0, 2 * itemsize * T * V, itemsize * T * V)


def value_head_forward(T: int, D: int, *, itemsize: int = 2, num_programs: int = 256) -> Cost:
    """Hidden read once for values, loss and the weight's gradient, which each program adds up by itself in float32."""
    return Cost(4.0 * T * D, itemsize * T * D + 8.0 * num_programs * D, 4.0 * num_programs * D)


def value_head_backward(T: int, D: int, *, itemsize: int = 2) -> Cost:
    """dv outer weight: hidden's gradient written once."""
    return Cost(1.0 * T * D, itemsize * T * D, 0)


def advantage(T: int) -> Cost:
    """Values read, advantages written, then read and written again by the whitening, float32."""
    return Cost(0, 16.0 * T, 4.0 * T)


def policy_loss(T: int) -> Cost:
    """Log-probs now and then, advantages, weights and entropies read, two gradients written, float32."""
    return Cost(0, 28.0 * T, 8.0 * T)
