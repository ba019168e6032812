"""Bytes of activations a token costs in one block: what the forward pass keeps for the backward, and what comes and goes.

Derived from the blocks' code in transformers. A linear layer keeps its input. RMSNorm keeps its input as float32 and the
normalised input. Rotary positions keep nothing of queries and keys (only the cosines, which all blocks share). Attention keeps
queries, keys, values, output and a logsumexp per head; `eager` keeps the probabilities of a token over all others instead, in
float32 and once more in the dtype of the computation. SiLU keeps its input and output, the gate's product both factors. A residual
sum keeps nothing; its result is the next norm's input. In float32 with the norm before (D, Q, K, F as below, n heads):

    norm 1 D input + D normalised + 1, attention's input D, Q queries, K keys, K values, Q output, n logsumexp,
    norm 2 D input + D normalised + 1, the MLP's input D, F gate, F silu(gate), F up, F product:   6 D + 2 Q + 2 K + 4 F + n + 2

With adapters, frozen weights need no gradient: norms keep no normalised input, linear layers without an adapter no input, those
with one also what its first matrix makes of it. The test compares these sums with the tensors that autograd really keeps.
"""

# Shape letters: D = hidden size, F = intermediate size, Q = heads x head size, K = key/value heads x head size
from dataclasses import dataclass
from typing import Literal

from tempo_em.plan.shape import Shape

FLOAT32 = 4


@dataclass(frozen=True)
class BlockActivations:
    """Bytes per token of one block. `kept`: by each block until its backward. `again`: what the backward of one block computes
    again. `forward`: comes and goes in a forward pass. `backward`: gradients that come and go in one block's backward."""

    kept: float
    again: float
    forward: float
    backward: float


def block_activations(
    shape: Shape,
    *,
    compute: int,
    attention: Literal["eager", "sdpa", "flash_attention_2"],
    checkpointing: Literal["off", "selective", "full"],
    row_tokens: int,
    adapted: frozenset[str] | None = None,
    rank: int = 0,
) -> BlockActivations:
    """Of a token in a row of `row_tokens` tokens; `compute` is the bytes of a number in the computation. `adapted`: linear layers
    with adapters of this rank, when nothing else is trained."""
    D, Q, K = shape.hidden_size, shape.query_size, shape.kv_size
    F, routed = shape.intermediate_size, max(shape.experts_per_token, 1)
    everything = _kept(shape, compute, attention, row_tokens)
    if adapted is not None:
        everything -= _not_kept_frozen(shape, compute, adapted) - compute * rank * len(adapted)
    products = compute * (Q + 2 * K + D + 2 * F * routed + D * routed)
    attended = compute * Q + FLOAT32 * shape.num_heads
    if attention == "eager":  # both batched products: scores, and their sum over values
        attended = compute * (Q + shape.num_heads * row_tokens)
    cached = {"off": everything, "selective": compute * D + products + attended, "full": compute * D}[checkpointing]
    # Recomputed products are the kept ones; those whose result the backward needs are not there twice.
    shared = {"off": everything, "selective": compute * (K + 2 * F * routed) + attended, "full": compute * D}[
        checkpointing
    ]
    scores = 2 * shape.num_heads * row_tokens * max(compute, FLOAT32) if attention == "eager" else 0
    mlp_backward = compute * (2 * D + 2 * F * routed)
    # by then the MLP's own activations are gone
    attention_backward = compute * (2 * D + 3 * Q + 4 * K) + scores - _mlp(shape, compute)
    return BlockActivations(
        kept=cached,
        again=max(everything - shared, 0),
        forward=max(compute * (4 * D + 3 * F * routed), compute * (3 * D + 4 * Q + 3 * K) + scores),
        backward=max(mlp_backward, attention_backward),
    )


def last_norm(shape: Shape, compute: int) -> float:
    """What the norm after the last block keeps of a token."""
    return _norms(1, shape.hidden_size, shape, compute)


def _kept(shape: Shape, compute: int, attention: str, row_tokens: int) -> float:
    D, Q, K = shape.hidden_size, shape.query_size, shape.kv_size
    norms = _norms(2, D, shape, compute) + 2 * compute * D
    if shape.family.qk_norm == "whole":
        norms += _norms(1, Q, shape, compute) + _norms(1, K, shape, compute)
    elif shape.family.qk_norm == "per_head":
        norms += _norms(shape.num_heads + shape.num_kv_heads, shape.head_size, shape, compute)
    attended = compute * (2 * Q + 2 * K) + FLOAT32 * shape.num_heads
    if attention == "eager":
        repeated = K if shape.num_kv_heads == shape.num_heads else Q
        probabilities = FLOAT32 + (compute if compute != FLOAT32 else 0)
        attended = compute * (2 * Q + 2 * repeated) + probabilities * shape.num_heads * row_tokens
    return norms + attended + _mlp(shape, compute)


def _not_kept_frozen(shape: Shape, compute: int, adapted: frozenset[str]) -> float:
    """What of `_kept` only gradients of weights need, and frozen ones do not."""
    D = shape.hidden_size
    normalised = compute if shape.family.norm == "before" else FLOAT32
    sizes = 2 * D + (0 if shape.family.qk_norm == "none" else shape.query_size + shape.kv_size)
    saved: float = normalised * sizes
    if not adapted & {"q_proj", "k_proj", "v_proj"}:
        saved += compute * D
    if not shape.num_experts:
        saved += compute * D * (not adapted & {"gate_proj", "up_proj"})
        saved += compute * shape.intermediate_size * ("down_proj" not in adapted)
    return saved


def _norms(count: int, size: int, shape: Shape, compute: int) -> float:
    """The float32 input, its scale and the normalised input: Llama's norm rounds it before the weight, OLMo's after."""
    return count * (FLOAT32 + (FLOAT32 + (compute if shape.family.norm == "before" else FLOAT32)) * size)


def _mlp(shape: Shape, compute: int) -> float:
    gated = 4 * compute * shape.intermediate_size
    if not shape.num_experts:
        return gated
    # Each token goes to several experts: gathered input, gated product and weighted output for each, and the router's softmax.
    routed = shape.experts_per_token * (gated + 2 * compute * shape.hidden_size)
    return routed + 2 * FLOAT32 * shape.num_experts
