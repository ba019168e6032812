"""Log-probabilities of chosen tokens straight from hidden states: LM head, log-softmax and gather in one op.

With logits x_t = cap(h_t W^T + b) / temperature_t, where cap(z) = c tanh(z / c) when a softcap c is given, and the maximum
m_t = max_v x_tv, the sums s_t = sum_v exp(x_tv - m_t) and u_t = sum_v exp(x_tv - m_t) (x_tv - m_t),

    logsumexp_t = m_t + log s_t
    logprob_t   = x_t[y_t] - logsumexp_t
    entropy_t   = log s_t - u_t / s_t               (centred on m_t: a shift of all logits changes no bit of it)

and, for upstream gradients g of the log-prob, g_H of the entropy and g_lse of the logsumexp,

    dx_tv = p_tv (a_t + b_t (x_tv - logsumexp_t)) + g_t 1(v = y_t),   p_tv = exp(x_tv - logsumexp_t)
    a_t   = g_lse - g - g_H H_t,   b_t = -g_H

The [T, V] logits never exist beyond a byte budget. In the forward pass they are cut into blocks whose (m, s, u) are merged in a
fixed order; the backward pass turns one block of logits at a time into dx and multiplies it into both gradients:

    STORE   all logits fit the budget: the forward pass keeps them              3 matrix products
    SLAB    a block has all tokens and as much of the vocabulary as fits        4: logits are computed again
    NOBUF   not even a narrow slab fits: tokens are cut as well                 4: memory does not grow with T or V

There are no atomics and no locks; a block's place never depends on the data: the same inputs give the same bits.
"""

# Shape letters: T = packed response tokens, D = hidden size, V = vocabulary, R = rows of a block, C = its columns
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.dispatch import use_triton
from tempo_kernels.linear_logprob_torch import (
    Block,
    RunningStats,
    Scaling,
    TokenStats,
    Upstream,
    backward_torch,
    linear_logprob_reference,
    products_,
    slices,
    stacked,
)
from tempo_kernels.linear_logprob_triton import backward_triton, forward_triton

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_reference"]

# STORE up to these many bytes of logits. A GPU's slabs must be wide enough for its matrix units.
CPU_MAX_BYTES = 80 * 2**20
GPU_MAX_BYTES = 512 * 2**20
# The smallest block: its columns are a multiple of every kernel's tile, its rows enough for a matrix product.
MIN_ROWS, MIN_COLUMNS = 256, 512
# Wider slabs gain nothing on a CPU; kept logits need not be taken all at once on a GPU either.
CPU_COLUMNS, GPU_KEPT_COLUMNS = 8192, 16384
# Kept rows begin at multiples of this many elements, so that they are read and written 16 bytes at a time.
ROW_ALIGNMENT = 64


class Cut(NamedTuple):
    """How the [T, V] logits are cut: a block has at most `num_rows` rows and `num_columns` columns."""

    is_stored: bool
    num_rows: int
    num_columns: int


def cut(num_tokens: int, vocab_size: int, bytes_each: int, max_bytes: int, most_columns: int) -> Cut:
    """STORE when all logits fit `max_bytes`, SLAB when MIN_COLUMNS of them do, else NOBUF, which also cuts the tokens."""
    if num_tokens * vocab_size * bytes_each <= max_bytes:
        return Cut(True, max(num_tokens, 1), min(most_columns, GPU_KEPT_COLUMNS))
    columns = max_bytes // (num_tokens * bytes_each)
    columns = min(max(columns // MIN_COLUMNS, 1) * MIN_COLUMNS, most_columns)
    rows = max(max_bytes // (columns * bytes_each), MIN_ROWS)
    return Cut(False, min(rows, num_tokens), columns)


def add_product_(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """sum += a b, where the sum is float32 (or as wide as a and b)."""
    if sum_MN.dtype == a_MK.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    elif sum_MN.is_cuda:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32, out=sum_MN)
    else:
        sum_MN.add_(a_MK @ b_KN)  # a CPU's product has one output dtype: each block is rounded, their sum is not


class _Call(NamedTuple):
    """What is not a tensor."""

    softcap: float | None
    vocab_size: int
    cut: Cut
    num_planes: int
    is_triton: bool


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, inverse_temperature_T: Tensor,
        call: _Call,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scaling = Scaling(bias_V, inverse_temperature_T, call.softcap)
        num_tokens, vocab_size, cut = len(hidden_TD), call.vocab_size, call.cut
        kept = _aligned_empty(hidden_TD, call.num_planes, num_tokens, vocab_size) if cut.is_stored else None
        kept_max = None
        if call.is_triton:
            stats, kept_max = forward_triton(
                hidden_TD, head_VD[:vocab_size], target_T, scaling, None if kept is None else kept[0]
            )
        else:
            room = kept if kept is not None else _room(hidden_TD, call)
            running = RunningStats(num_tokens, inverse_temperature_T)
            for columns in slices(vocab_size, cut.num_columns):
                for rows in slices(num_tokens, cut.num_rows):
                    products = room[:, rows, columns] if kept is not None else _corner(room, rows, columns)
                    products_(hidden_TD[rows], head_VD[columns], products)
                    running.add(
                        Block(products, scaling.part(rows, columns), target_T[rows] - columns.start), rows.start
                    )
            stats = running.result()
        ctx.call, ctx.is_spent = call, False
        ctx.save_for_backward(
            hidden_TD, head_VD, bias_V, target_T, inverse_temperature_T, stats.logsumexp_T, stats.entropy_T,
            kept, kept_max,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats.is_top1_T)
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_spent:
            raise RuntimeError(
                "the stored logits of linear_logprob were overwritten by its first backward pass; "
                "to go backward twice, call it with max_bytes=0"
            )
        call, (*inputs, logsumexp_T, entropy_T, kept, kept_max) = ctx.call, ctx.saved_tensors
        hidden_TD, head_VD, bias_V, target_T, inverse_temperature_T = inputs
        ctx.is_spent = kept is not None
        g_3T = stacked(grads[:3], logsumexp_T)
        upstream = torch.stack(Upstream.of(g_3T, logsumexp_T, entropy_T, inverse_temperature_T))
        # Only rows that someone asks about: a NaN asks too.
        live = (g_3T != 0).any(0).nonzero()[:, 0]
        live = None if len(live) == len(target_T) else live
        if live is not None:
            hidden_TD, target_T, inverse_temperature_T = hidden_TD[live], target_T[live], inverse_temperature_T[live]
            upstream, kept_max = upstream[:, live], None if kept_max is None else kept_max[:, live]
        work = _Backward(
            call, hidden_TD, head_VD, target_T, Scaling(bias_V, inverse_temperature_T, call.softcap), upstream, kept,
            kept_max, live, grads[1] is not None,
        )  # fmt: skip
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        d_hidden, d_head, d_bias = work.run(needs_hidden, needs_head, needs_bias)
        if d_hidden is not None and live is not None:
            d_hidden = d_hidden.new_zeros(ctx.saved_tensors[0].shape).index_copy_(0, live, d_hidden)
        return d_hidden, d_head, d_bias, None, None, None


def _aligned_empty(like: Tensor, num_planes: int, num_rows: int, num_columns: int) -> Tensor:
    stride = -(-num_columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return like.new_empty(num_planes, num_rows, stride)[:, :, :num_columns]


def _room(hidden_TD: Tensor, call: _Call) -> Tensor:
    """Memory for one block that is not kept, [planes, R, C]."""
    return hidden_TD.new_empty(call.num_planes, call.cut.num_rows, min(call.cut.num_columns, call.vocab_size))


def _corner(room: Tensor, rows: slice, columns: slice) -> Tensor:
    return room[:, : rows.stop - rows.start, : columns.stop - columns.start]


class _Backward(NamedTuple):
    """Block by block: logits -> their gradient -> its products with head and hidden."""

    call: _Call
    hidden_RD: Tensor
    head_VD: Tensor
    target_R: Tensor
    scaling: Scaling
    upstream_4R: Tensor
    kept_PTV: Tensor | None
    kept_max: Tensor | None
    live: Tensor | None
    has_entropy: bool

    def run(self, needs_hidden: bool, needs_head: bool, needs_bias: bool) -> tuple[Tensor | None, ...]:
        (num_rows, size), vocab_size, cut = self.hidden_RD.shape, self.call.vocab_size, self.call.cut
        wide = self.upstream_4R.dtype
        d_hidden = self.hidden_RD.new_zeros(num_rows, size, dtype=wide) if needs_hidden else None
        d_head = torch.empty_like(self.head_VD, memory_format=torch.contiguous_format) if needs_head else None
        d_bias = self.upstream_4R.new_zeros(len(self.head_VD)) if needs_bias else None
        if d_head is not None:  # padded rows of the head, or all of them, when no token asks
            d_head[vocab_size if num_rows else 0 :].zero_()
        room = None if self.kept_PTV is not None else _room(self.hidden_RD, self.call)
        for columns in slices(vocab_size, cut.num_columns):
            is_whole = num_rows <= cut.num_rows
            d_columns = None if is_whole or d_head is None else d_head.new_zeros(d_head[columns].shape, dtype=wide)
            for rows in slices(num_rows, cut.num_rows):
                dproduct_RC = self.block(rows, columns, room)
                if d_hidden is not None:
                    add_product_(d_hidden[rows], dproduct_RC, self.head_VD[columns])
                if d_bias is not None:
                    d_bias[columns] += dproduct_RC.sum(0, dtype=wide)
                if d_columns is not None:
                    add_product_(d_columns, dproduct_RC.T, self.hidden_RD[rows])
                elif d_head is not None:
                    torch.mm(dproduct_RC.T, self.hidden_RD, out=d_head[columns])
            if d_head is not None and d_columns is not None:
                d_head[columns] = d_columns
        d_bias = None if d_bias is None or self.scaling.bias_V is None else d_bias.to(self.scaling.bias_V.dtype)
        return None if d_hidden is None else d_hidden.to(self.hidden_RD.dtype), d_head, d_bias

    def block(self, rows: slice, columns: slice, room: Tensor | None) -> Tensor:
        """The gradient of the products of these rows and columns, [R, C]."""
        if self.kept_PTV is not None:
            products = self.kept_PTV[:, :, columns]
            if self.live is None:
                products = products[:, rows]
            else:
                live = _aligned_empty(products, len(products), len(self.live), products.shape[2])
                products = torch.index_select(products, 1, self.live, out=live)
        else:
            assert room is not None
            products = _corner(room, rows, columns)
        scaling, upstream_4R = self.scaling.part(rows, columns), self.upstream_4R[:, rows].contiguous()
        target_R = self.target_R[rows] - columns.start
        if self.call.is_triton:
            backward_triton(
                self.hidden_RD[rows], self.head_VD[columns], target_R, scaling, upstream_4R, products[0],
                self.kept_max, columns.start,
            )  # fmt: skip
        else:
            if self.kept_PTV is None:
                products_(self.hidden_RD[rows], self.head_VD[columns], products)
            backward_torch(Block(products, scaling, target_R), Upstream(*upstream_4R), has_entropy=self.has_entropy)
        return products[0]


def linear_logprob(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    max_bytes: int | None = None,
    precise: bool = False,
    check_target: bool | None = None,
) -> TokenStats:
    """Same as `log_softmax(hidden_TD @ head_VD.T / temperature)[arange(T), target_T]`, plus entropy, logsumexp and whether no
    token was more likely than the target, while at most `max_bytes` of logits exist at a time.

    Triton kernels run it on a GPU, PyTorch elsewhere (see `tempo_kernels.dispatch`). Log-prob, entropy and logsumexp are
    differentiable with respect to hidden, head and bias; a frozen one costs nothing, nor do rows without upstream gradient.
    Autocast changes nothing: float32 inputs are multiplied in float32.

    Args:
        hidden_TD: hidden states of the positions that predict the targets; any float dtype, rows may be strided.
        head_VD: LM head weight, in the dtype of hidden. target_T: token ids. bias: [V].
        temperature: one number, or one for each token, [T].
        softcap: c of Gemma's c tanh(z / c).
        vocab_size: the true vocabulary, when the head has padded rows after it: these get no probability and no gradient.
        max_bytes: budget for logits; 80 MiB on a CPU and 512 MiB on a GPU when not given. The smallest block is 256 x 512.
        precise: on a CPU in half precision, products are rounded to that precision (2e-2 nats at logits of 16; a GPU's kernels
            keep float32). True computes what the rounding lost, for one more matrix product each time logits are computed.
        check_target: whether to look for targets outside the vocabulary, which get a log-prob of NaN. When not given: on a CPU,
            where it does not make the host wait.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a sharded weight, a temperature or softcap that is not positive,
            a target outside the vocabulary.
    """
    vocab_size = len(head_VD) if vocab_size is None else vocab_size
    _check(hidden_TD, head_VD, target_T, bias, temperature, softcap, vocab_size, max_bytes, check_target)
    num_tokens, is_triton = len(hidden_TD), use_triton(hidden_TD)
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        inverse_temperature_T = (
            temperature.detach().to(hidden_TD.device, dtype).reciprocal().expand(num_tokens).contiguous()
        )
    else:  # filled on the device: copying a number to a GPU would make the host wait
        inverse_temperature_T = hidden_TD.new_full((num_tokens,), 1.0 / temperature, dtype=dtype)
    num_planes = 2 if precise and not is_triton and hidden_TD.dtype.itemsize < 4 else 1
    if max_bytes is None:
        max_bytes = GPU_MAX_BYTES if hidden_TD.is_cuda else CPU_MAX_BYTES
    has_backward = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden_TD, head_VD, bias)
    )
    most_columns = -(-vocab_size // MIN_COLUMNS) * MIN_COLUMNS
    if not hidden_TD.is_cuda:
        most_columns = min(most_columns, CPU_COLUMNS)
    blocks = cut(num_tokens, vocab_size, hidden_TD.dtype.itemsize * num_planes, max_bytes, most_columns)
    if not has_backward:
        blocks = blocks._replace(is_stored=False)
    results = _LinearLogprob.apply(
        _aligned(hidden_TD),
        _aligned(head_VD),
        None if bias is None else bias.contiguous(), target_T.long().contiguous(),
        inverse_temperature_T, _Call(softcap, vocab_size, blocks, num_planes, is_triton),
    )  # fmt: skip
    return TokenStats(*results)


def _aligned(x: Tensor) -> Tensor:
    """x, copied if its rows are not contiguous or cannot be read 16 bytes at a time."""
    is_aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(-1) == 1 and (is_aligned or not x.is_cuda) else x.contiguous()


def _check(
    hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, bias: Tensor | None, temperature: float | Tensor,
    softcap: float | None, vocab_size: int, max_bytes: int | None, check_target: bool | None,
) -> None:  # fmt: skip
    for name, x in (("hidden", hidden_TD), ("head", head_VD), ("bias", bias)):
        if hasattr(x, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, sharded over ranks: call linear_logprob inside the forward of the module that FSDP wraps, "
                "which gathers it, or pass full_tensor()"
            )
        if x is not None and (not x.is_floating_point() or x.dtype != hidden_TD.dtype or x.device != hidden_TD.device):
            raise ValueError(
                f"want {name} in the floating dtype and on the device of hidden ({hidden_TD.dtype} on {hidden_TD.device}), "
                f"got {x.dtype} on {x.device}"
            )
    if hidden_TD.ndim != 2 or head_VD.ndim != 2 or hidden_TD.shape[1] != head_VD.shape[1]:
        raise ValueError(f"want hidden [T, D] and head [V, D], got {tuple(hidden_TD.shape)} and {tuple(head_VD.shape)}")
    if not 0 < vocab_size <= len(head_VD):
        raise ValueError(f"vocab_size must be within 1..{len(head_VD)}, the rows of head, got {vocab_size}")
    if target_T.shape != hidden_TD.shape[:1] or target_T.is_floating_point() or target_T.device != hidden_TD.device:
        raise ValueError(
            f"want one integer target per row of hidden ({len(hidden_TD)}) on {hidden_TD.device}, "
            f"got {target_T.dtype} of shape {tuple(target_T.shape)} on {target_T.device}"
        )
    if bias is not None and bias.shape != head_VD.shape[:1]:
        raise ValueError(f"want one bias per row of head ({len(head_VD)}), got shape {tuple(bias.shape)}")
    if isinstance(temperature, Tensor) and temperature.shape not in ((), target_T.shape):
        raise ValueError(
            f"want one temperature, or one per token ({len(target_T)}), got shape {tuple(temperature.shape)}"
        )
    is_positive = not isinstance(temperature, Tensor) and temperature > 0
    if isinstance(temperature, Tensor):
        is_positive = temperature.is_cuda or bool((temperature > 0).all())  # looking on a GPU would make the host wait
    if not is_positive or (softcap is not None and softcap <= 0) or (max_bytes is not None and max_bytes < 0):
        raise ValueError(
            f"temperature and softcap must be positive and max_bytes not negative, got {temperature}, {softcap} and {max_bytes}"
        )
    if check_target if check_target is not None else not target_T.is_cuda:
        is_outside = (target_T < 0) | (target_T >= vocab_size)
        if is_outside.any():
            raise ValueError(f"targets must be within 0..{vocab_size - 1}, got {target_T[is_outside][:5].tolist()}")
