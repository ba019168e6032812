"""linear_logprob's cases: shapes, inputs as a trained model has them, the truth, and whom we are compared with."""

# Shape letters: T = packed tokens, D = hidden size, V = vocabulary
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempo_kernels import cost
from tempo_kernels.bench import peers
from tempo_kernels.bench.measure import MIB, Comparison, Side, Truth, error_of
from tempo_kernels.bench.peers import HeadInputs, softmax_logprob
from tempo_kernels.linear_logprob import CPU_COLUMNS, CPU_MAX_BYTES, GPU_MAX_BYTES, MIN_COLUMNS, cut

# Wide logits are peaked as a trained model's are; a rounded product costs most there.
LOGIT_STD = 4.0


class HeadShape(NamedTuple):
    hidden_size: int
    vocab_size: int
    num_tokens: int
    dtype: torch.dtype
    target: float | None = None  # of our time over the bare products'
    softmax_target: float | None = None  # of our time over that of log_softmax of all logits in float32
    has_modes: bool = False  # whether the modes are compared too
    has_default_chunks: bool = False  # one pass with torch's default chunks takes minutes on the widest vocabulary

    def __str__(self) -> str:
        return f"H={self.hidden_size} V={self.vocab_size} T={self.num_tokens}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


SHAPES = (
    HeadShape(576, 49152, 512, torch.bfloat16, 1.75, 0.75, has_modes=True, has_default_chunks=True),
    HeadShape(1024, 151936, 256, torch.bfloat16, 1.5),
    HeadShape(576, 49152, 256, torch.float32, 1.3, has_default_chunks=True),
)
QUICK_SHAPES = (
    HeadShape(64, 4000, 300, torch.bfloat16, has_modes=True),
    HeadShape(64, 1000, 48, torch.float32, has_default_chunks=True),
)
GPU_SHAPES = (*SHAPES, HeadShape(4096, 151936, 8192, torch.bfloat16, has_modes=True))


def head_inputs(shape: HeadShape, device: torch.device) -> HeadInputs:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden_TD = draw(shape.num_tokens, shape.hidden_size).to(shape.dtype)
    head_VD = (draw(shape.vocab_size, shape.hidden_size) * (LOGIT_STD / shape.hidden_size**0.5)).to(shape.dtype)
    target_T = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator, device=device)
    return HeadInputs(
        hidden_TD.requires_grad_(), head_VD.requires_grad_(), target_T, draw(shape.num_tokens), draw(shape.num_tokens)
    )


def head_truths(inputs: HeadInputs) -> tuple[Truth, Truth, Tensor]:
    """The truth with entropy, the truth without, and the gradient of the logits (with entropy) in the dtype of hidden."""
    wide = torch.float64 if inputs.hidden_TD.dtype == torch.float32 else torch.float32
    exact = inputs._replace(
        hidden_TD=inputs.hidden_TD.detach().to(wide).requires_grad_(),
        head_VD=inputs.head_VD.detach().to(wide).requires_grad_(),
    )
    logits_TV, logprob_T, entropy_T = softmax_logprob(exact, wide)
    upstream = [inputs.g_T.to(wide), inputs.g_entropy_T.to(wide)]
    (dlogits_TV,) = torch.autograd.grad([logprob_T, entropy_T], [logits_TV], upstream, retain_graph=True)
    dlogits_TV = dlogits_TV.to(inputs.hidden_TD.dtype)
    values = [exact.results(logprob_T, entropy_T, retain=True), exact.results(logprob_T)]
    del logits_TV, logprob_T, entropy_T
    _, logprob_T, entropy_T = softmax_logprob(inputs)
    eager = [inputs.results(logprob_T, entropy_T, retain=True), inputs.results(logprob_T)]
    both, alone = (
        Truth(want, {name: error_of(name, got[name], want[name]) for name in want})
        for want, got in zip(values, eager, strict=True)
    )
    return both, alone, dlogits_TV


def mode_of(shape: HeadShape, device: torch.device, max_bytes: int | None = None) -> cost.Mode:
    """How `linear_logprob` cuts the logits; without `max_bytes` by its own budget for the device."""
    default, most_columns = (GPU_MAX_BYTES, shape.vocab_size) if device.type == "cuda" else (CPU_MAX_BYTES, CPU_COLUMNS)
    max_bytes = default if max_bytes is None else max_bytes
    blocks = cut(shape.num_tokens, shape.vocab_size, shape.dtype.itemsize, max_bytes, most_columns)
    return "STORE" if blocks.is_stored else "SLAB" if blocks.num_rows == shape.num_tokens else "NOBUF"


def roofline(shape: HeadShape, device: torch.device) -> Side | None:
    """The least time of our default mode's products and transfers; None on a device whose peak rates `cost` does not have, and in
    a dtype other than the one they are for, bfloat16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu = next((gpu for gpu in cost.GPUS if gpu.name in name), None)
    if gpu is None or shape.dtype != torch.bfloat16:
        return None
    mode, size = mode_of(shape, device), (shape.num_tokens, shape.hidden_size, shape.vocab_size)
    forward = cost.linear_logprob_forward(*size, itemsize=shape.dtype.itemsize, mode=mode)
    backward = cost.linear_logprob_backward(*size, itemsize=shape.dtype.itemsize, mode=mode, max_bytes=GPU_MAX_BYTES)
    return Side(f"roofline of {mode}, {gpu.name}", lambda: dict, bound_ms=gpu.floor_ms(forward + backward))


def head_comparisons(shape: HeadShape, device: torch.device) -> Iterator[Comparison]:
    inputs = head_inputs(shape, device)
    truth, truth_alone, dlogits_TV = head_truths(inputs)
    case = f"{shape}, {mode_of(shape, device)} by default"
    ours, bare = peers.our_head(inputs), peers.bare_products(inputs, dlogits_TV)
    both = partial(Comparison, "linear_logprob", case, shape.dtype_name, ours, truth=truth)
    alone = partial(
        Comparison, "linear_logprob", f"{case}, log-prob only", shape.dtype_name,
        peers.our_head(inputs, has_entropy=False), truth=truth_alone,
    )  # fmt: skip
    yield both(bare, target=shape.target)
    if shape.has_modes:
        for label, options in modes(shape):
            comparison = both(bare, note=f"logit std {LOGIT_STD:g}")
            yield comparison._replace(case=f"{shape}, {label}", ours=peers.our_head(inputs, label, **options))
    bound = roofline(shape, device)
    if bound is not None:
        yield both(bound)
    yield both(peers.float32_softmax(inputs), target=shape.softmax_target)
    yield alone(peers.torch_chunks(inputs, ""))
    if shape.has_default_chunks:
        yield alone(peers.torch_chunks(inputs, "default chunks"))
    for policy in ("compact", "accurate"):
        label = f"chunks of 256, {policy}"
        yield alone(peers.torch_chunks(inputs, label, batch_chunk_size=256, chunking_method=None, acc_policy=policy))
    yield both(peers.trl_chunks(inputs))
    yield alone(peers.liger_chunks(inputs))
    yield both(peers.liger_scaled(inputs))
    if device.type == "cuda":
        yield alone(peers.liger_cross_entropy(inputs))
        yield alone(peers.cut_cross_entropy(inputs))


def modes(shape: HeadShape) -> list[tuple[str, dict[str, Any]]]:
    """Budgets that make all logits be kept, cut into wide and narrow slabs of the vocabulary, and cut both ways; exact products."""
    num_bytes = shape.num_tokens * shape.vocab_size * shape.dtype.itemsize
    narrowest = shape.num_tokens * MIN_COLUMNS * shape.dtype.itemsize
    budgets = {"STORE": num_bytes, "SLAB": num_bytes // 3, "narrow SLAB": 2 * narrowest, "NOBUF": narrowest // 2}
    by_budget = [
        (f"{name}, max_bytes={budget / MIB:.3g} MiB", {"max_bytes": budget}) for name, budget in budgets.items()
    ]
    return [*by_budget, ("precise=True", {"precise": True})]
