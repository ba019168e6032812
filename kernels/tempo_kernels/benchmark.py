"""Micro-benchmarks: each op against named peers on the same inputs, in time and in peak memory.

A row is one comparison. Before anything is timed, both sides are held against a reference in a wider dtype: outputs and gradients
may be off by twice what eager PyTorch in the op's own dtype is off, plus 1e-5. A peer that aims lower is held to the tolerance of
its own tests, and its errors stand in the row. A side that fails its check is never timed.

On a CPU a time is CPU time of one thread, the best of several runs; ours and the peer's alternate in one process, so that a drift
of the machine hits both. On a GPU it is the median of `triton.testing.do_bench`. A time is a forward and a backward pass with the
same upstream gradients on both sides. A peer without entropy is compared on the log-prob alone, and the case says so.

Peak memory is what a pass holds above its inputs and what it returns (results and gradients), counted at the allocator.
"""

# Shape letters: T = packed tokens, S = sequences, D = hidden size, V = vocabulary
from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table

Tensors = dict[str, Tensor]
Run = Callable[[], Tensors]

EPS = 1e-5
# Runs of a row alternate until this much time is used, at least twice and at most REPEATS times.
SECONDS, REPEATS = 3.0, 5
# A pass slower than this runs once, while it is checked: the whole ends in five minutes.
SLOW_SECONDS = 6.0
# A run shorter than this is repeated inside one measurement.
SHORTEST_SECONDS = 0.02
# Wide logits are peaked as a trained model's are; a rounded product costs most there.
LOGIT_STD = 4.0
MIB = 2**20
# Dense bf16 matrix products without sparsity, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "MI300X": 1307e12}


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; times are in `unit`, `ratio` is ours / theirs, and what could not be measured is None."""

    op: str
    case: str
    dtype: str
    ours: float | None
    peer: str
    theirs: float | None
    ratio: float | None
    unit: str
    peak_bytes: int | None
    checked: bool
    peer_peak_bytes: int | None = None
    target: float | None = None
    error: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # largest error of each output: ours, peer, our limit
    note: str = ""


class Side(NamedTuple):
    """One way to compute an op: `load` imports what it needs and returns the pass to be timed, which names what it returns."""

    name: str
    load: Callable[[], Run]
    requirement: str = ""  # what pip has to install for it
    tolerance: float = 0.0  # of the peer's own tests, relative to the largest element
    returns: tuple[str, ...] = ()  # when that is not all of what the op returns
    bound_ms: float | None = None  # not a pass but a lower bound


class Truth(NamedTuple):
    """What a pass should return, and how far eager PyTorch in the op's own dtype is from it."""

    values: Tensors
    eager_errors: dict[str, float]


class Comparison(NamedTuple):
    op: str
    case: str
    dtype: str
    ours: Side
    peer: Side
    truth: Truth
    target: float | None = None
    note: str = ""


class Suite(NamedTuple):
    """All comparisons on the same inputs."""

    name: str
    comparisons: Callable[[torch.device], Iterable[Comparison]]


class Checked(NamedTuple):
    """A side after its check: the pass and what was measured on the way, or the problem."""

    run: Run | None
    seconds: float = 0.0
    peak_bytes: int | None = None
    errors: dict[str, float] = {}  # noqa: RUF012
    problem: str = ""


# ---------------------------------------------------------------------------------------------------------- measuring


def peak_memory(run: Run, device: torch.device) -> tuple[Tensors, int]:
    """What `run` returns, and the most bytes that existed during it beyond those before it and those it returns.

    On a CPU every allocation and release that PyTorch's allocator makes is counted, scratch memory of matrix products included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each use of the profiler prints two lines
        profiler = torch.autograd.profiler.profile(profile_memory=True)
        with profiler:
            results = run()
        recorded: Any = profiler.kineto_results
        events = [event for event in recorded.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    returned = sum(x.numel() * x.element_size() for x in results.values())
    return results, max(peak - returned, 0)


def error_of(name: str, got: Tensor, want: Tensor) -> float:
    """Largest difference; of a gradient (`d_...`) relative to its largest element. NaN when there is one."""
    if got.shape != want.shape:
        return math.inf
    error = float((got.to(want.dtype) - want).abs_().max())
    return error / max(float(want.abs().max()), 1e-30) if name.startswith("d_") else error


def limits(truth: Truth, tolerance: float = 0.0) -> dict[str, float]:
    """The largest error that each output may have."""
    scales = {name: 1.0 if name.startswith("d_") else float(want.abs().max()) for name, want in truth.values.items()}
    return {name: max(2 * e + EPS, tolerance * scales[name]) for name, e in truth.eager_errors.items()}


def check(side: Side, truth: Truth, device: torch.device) -> Checked:
    """Run a side once and compare all it returns with the truth."""
    if side.bound_ms is not None:
        return Checked(None, side.bound_ms / 1000)
    try:
        run = side.load()
        start = time.process_time()
        results, peak_bytes = peak_memory(run, device)
        seconds = time.process_time() - start
    except ImportError as error:  # some peers import what they need as they run
        how = f"pip install '{side.requirement}'" if side.requirement else "not in this version of tempo_kernels"
        return Checked(None, problem=f"not installed: {how} ({error})")
    except Exception as error:  # a peer may fail in any way; the other rows still count
        return Checked(None, problem=f"failed: {type(error).__name__}: {error}".partition("\n")[0])
    allowed = limits(truth, side.tolerance)
    names = side.returns or tuple(truth.values)
    missing = [name for name in names if name not in results]
    if missing:
        return Checked(None, problem=f"failed the check: no {', '.join(missing)}")
    errors = {name: error_of(name, results[name], truth.values[name]) for name in names}
    wrong = [
        f"{name} off by {e:.2g} (limit {allowed[name]:.2g})" for name, e in errors.items() if not e <= allowed[name]
    ]
    errors = {name: e for name, e in errors.items() if math.isfinite(e)}
    problem = f"failed the check: {', '.join(wrong)}" if wrong else ""
    return Checked(None if wrong else run, seconds, peak_bytes, errors, problem)


def cpu_seconds(run: Run, num_calls: int) -> float:
    """CPU time of one call."""
    start = time.process_time()
    for _ in range(num_calls):
        run()
    return (time.process_time() - start) / num_calls


def best_times(ours: Checked, theirs: Checked, device: torch.device) -> tuple[float, float]:
    """Milliseconds of both sides, measured in turn. Not measured are a bound, and again a pass that was slow in its check."""
    if device.type == "cuda":
        do_bench = partial(
            importlib.import_module("triton.testing").do_bench, warmup=100, rep=500, return_mode="median"
        )
        turns = [[float(do_bench(x.run)) if x.run else x.seconds * 1000 for x in (ours, theirs)] for _ in range(2)]
        return min(turn[0] for turn in turns), min(turn[1] for turn in turns)
    best = [ours.seconds, theirs.seconds]
    sides = [(i, x) for i, x in enumerate((ours, theirs)) if x.run and x.seconds < SLOW_SECONDS]
    start = time.process_time()
    for turn in range(REPEATS):
        for i, x in sides:
            assert x.run is not None
            seconds = cpu_seconds(x.run, max(1, math.ceil(SHORTEST_SECONDS / max(x.seconds, 1e-6))))
            best[i] = seconds if turn == 0 else min(best[i], seconds)
        if turn > 0 and time.process_time() - start > SECONDS:
            break
    return best[0] * 1000, best[1] * 1000


def compare(comparison: Comparison, known: dict[str, Checked], device: torch.device) -> Row:
    """Check both sides, then time them. `known` keeps the checks of our sides, which meet several peers, by case and name."""
    c = comparison
    key = f"{c.case} {c.ours.name}"
    if key not in known:
        known[key] = check(c.ours, c.truth, device)
    ours, theirs = known[key], check(c.peer, c.truth, device)
    unit = "ms" if device.type == "cuda" else "ms CPU"
    strict = limits(c.truth)
    error = {"ours": ours.errors, "peer": theirs.errors, "limit": strict}
    row = partial(
        Row, op=c.op, case=c.case, dtype=c.dtype, peer=c.peer.name, unit=unit, peak_bytes=ours.peak_bytes,
        peer_peak_bytes=theirs.peak_bytes, target=c.target, error=error,
    )  # fmt: skip
    problems = [f"{name}: {x.problem}" for name, x in (("ours", ours), ("peer", theirs)) if x.problem]
    if problems:
        return row(ours=None, theirs=None, ratio=None, checked=False, note="; ".join(problems))
    our_ms, their_ms = best_times(ours, theirs, device)
    notes = [c.note]
    loose = [name for name, e in theirs.errors.items() if e > strict[name]]
    if loose:
        notes.append(f"the peer's {' and '.join(loose)} only within its own tolerance, {c.peer.tolerance:g}")
    if device.type != "cuda" and theirs.seconds >= SLOW_SECONDS:
        notes.append("the peer ran once")
    note = "; ".join(x for x in notes if x)
    return row(ours=our_ms, theirs=their_ms, ratio=our_ms / their_ms, checked=True, note=note)


def run_benchmarks(
    cases: Sequence[str] = (),
    *,
    quick: bool = False,
    device: torch.device | None = None,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure the suites whose names contain one of `cases` (all of them when there is none), about five minutes on a CPU.

    `quick` takes tiny shapes, for trying the machinery; `progress` is called with each row as it is done.

    Raises ValueError when a case is in no suite's name.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_suites = suites(device, quick=quick)
    unknown = [case for case in cases if not any(case in suite.name for suite in all_suites)]
    if unknown:
        raise ValueError(f"no case contains {unknown[0]!r}; cases: {', '.join(suite.name for suite in all_suites)}")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for suite in all_suites:
            if cases and not any(case in suite.name for case in cases):
                continue
            known: dict[str, Checked] = {}
            for comparison in suite.comparisons(device):
                rows.append(compare(comparison, known, device))
                if progress:
                    progress(rows[-1])
            gc.collect()
    finally:
        torch.set_num_threads(num_threads)
    return rows


def case_names(*, quick: bool = False) -> list[str]:
    """Names that `run_benchmarks` chooses by."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [suite.name for suite in suites(device, quick=quick)]


# -------------------------------------------------------------------------------------------------------- linear_logprob


class HeadShape(NamedTuple):
    hidden_size: int
    vocab_size: int
    num_tokens: int
    dtype: torch.dtype
    target: float | None = None  # of our time over the bare products'
    has_modes: bool = False  # whether the modes are compared too
    has_default_chunks: bool = False  # one pass with torch's default chunks takes minutes on the widest vocabulary

    def __str__(self) -> str:
        return f"H={self.hidden_size} V={self.vocab_size} T={self.num_tokens}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


HEAD_SHAPES = (
    HeadShape(576, 49152, 512, torch.bfloat16, 1.75, has_modes=True, has_default_chunks=True),
    HeadShape(1024, 151936, 256, torch.bfloat16, 1.5),
    HeadShape(576, 49152, 256, torch.float32, 1.3, has_default_chunks=True),
)
QUICK_HEAD_SHAPES = (
    HeadShape(64, 1000, 48, torch.bfloat16, has_modes=True),
    HeadShape(64, 1000, 48, torch.float32, has_default_chunks=True),
)
GPU_HEAD_SHAPES = (*HEAD_SHAPES, HeadShape(4096, 151936, 8192, torch.bfloat16, has_modes=True))
SOFTMAX_TARGET = 0.75


class HeadInputs(NamedTuple):
    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    g_T: Tensor
    g_entropy_T: Tensor

    def results(self, logprob_T: Tensor, entropy_T: Tensor | None = None, *, retain: bool = False) -> Tensors:
        """Outputs and gradients; every side gets the same upstream gradients."""
        outputs = {"logprob": logprob_T} if entropy_T is None else {"logprob": logprob_T, "entropy": entropy_T}
        upstream = [g.to(x.dtype) for x, g in zip(outputs.values(), (self.g_T, self.g_entropy_T), strict=False)]
        d_hidden, d_head = torch.autograd.grad(
            list(outputs.values()), [self.hidden_TD, self.head_VD], upstream, retain_graph=retain
        )
        return {name: x.detach() for name, x in outputs.items()} | {"d_hidden": d_hidden, "d_head": d_head}


def head_inputs(shape: HeadShape, device: torch.device) -> HeadInputs:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden_TD = draw(shape.num_tokens, shape.hidden_size).to(shape.dtype)
    head_VD = (draw(shape.vocab_size, shape.hidden_size) * (LOGIT_STD / shape.hidden_size**0.5)).to(shape.dtype)
    target_T = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator, device=device)
    return HeadInputs(
        hidden_TD.requires_grad_(), head_VD.requires_grad_(), target_T, draw(shape.num_tokens), draw(shape.num_tokens)
    )


def softmax_logprob(inputs: HeadInputs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(logits in the dtype of hidden, log-prob, entropy) the plain way, by log_softmax over all logits in `dtype`."""
    logits_TV = inputs.hidden_TD @ inputs.head_VD.T
    logp_TV = logits_TV.to(dtype or torch.float32).log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logits_TV, logp_TV.gather(-1, inputs.target_T[:, None])[:, 0], entropy_T


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


def our_head(inputs: HeadInputs, name: str = "default", *, has_entropy: bool = True, **options: Any) -> Side:
    def load() -> Run:
        from tempo_kernels.linear_logprob import linear_logprob

        def run() -> Tensors:
            stats = linear_logprob(inputs.hidden_TD, inputs.head_VD, inputs.target_T, **options)
            return inputs.results(stats.logprob_T, stats.entropy_T if has_entropy else None)

        return run

    return Side(name, load)


def bare_products(inputs: HeadInputs, dlogits_TV: Tensor) -> Side:
    """h W^T, dz W and dz^T h with the true dz: what no exact way can do without."""

    def run() -> Tensors:
        with torch.no_grad():
            _ = inputs.hidden_TD @ inputs.head_VD.T
            return {"d_hidden": dlogits_TV @ inputs.head_VD, "d_head": dlogits_TV.T @ inputs.hidden_TD}

    return Side(f"three bare products, torch {torch.__version__}", lambda: run, returns=("d_hidden", "d_head"))


def float32_softmax(inputs: HeadInputs) -> Side:
    def run() -> Tensors:
        return inputs.results(*softmax_logprob(inputs)[1:])

    return Side(f"log_softmax of all logits in float32, torch {torch.__version__}", lambda: run)


def torch_chunks(inputs: HeadInputs, label: str, **options: Any) -> Side:
    """`F.linear_cross_entropy`; without options its reference path, which keeps all logits in the dtype of hidden."""

    def load() -> Run:
        from torch.nn import LinearCrossEntropyOptions

        chosen = LinearCrossEntropyOptions(**options) if label else None

        def run() -> Tensors:
            loss_T = F.linear_cross_entropy(
                inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none", options=chosen
            )
            return inputs.results(-loss_T)

        return run

    # torch.testing.assert_close's tolerance for bfloat16: its log-prob has that dtype
    tolerance = 1.6e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 0.0
    name = f"F.linear_cross_entropy{f', {label}' if label else ''}, torch {torch.__version__}"
    return Side(name, load, tolerance=tolerance)


def _versioned(name: str, distribution: str) -> str:
    try:
        package, _, function = name.partition(" ")
        return f"{package} {metadata.version(distribution)} {function}"
    except metadata.PackageNotFoundError:
        return name


def trl_chunks(inputs: HeadInputs) -> Side:
    def load() -> Run:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
        # its backward pass imports this module, with all that TRL requires
        width = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

        def run() -> Tensors:
            logprob_T, entropy_T, *_ = function.apply(
                inputs.hidden_TD, inputs.head_VD, None, inputs.target_T, 1.0, width, None, 1.0, ("entropy",)
            )
            return inputs.results(logprob_T, entropy_T)

        return run

    return Side(_versioned("TRL ChunkedLogProbFunction", "trl"), load, "trl>=1.16")


def liger_chunks(inputs: HeadInputs) -> Side:
    """The log-prob inside Liger's chunked PPO and GRPO losses, without the loss around it."""

    def load() -> Run:
        module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")

        def run() -> Tensors:
            logprob_1T = module.LigerFusedLinearPPOBase.chunk_forward(
                inputs.hidden_TD[None], inputs.head_VD, inputs.target_T[None]
            )
            return inputs.results(logprob_1T[0])

        return run

    return Side(_versioned("Liger LigerFusedLinearPPOBase.chunk_forward", "liger-kernel"), load, "liger-kernel>=0.8.5")


def liger_scaled(inputs: HeadInputs) -> Side:
    """Log-prob and entropy; in PyTorch by chunks of 512 tokens, on an H100 or H200 by kernels of its own."""

    def load() -> Run:
        module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

        def run() -> Tensors:
            nll_T, entropy_T = module.LigerFusedLinearScaledCrossEntropyFunction.apply(
                inputs.hidden_TD, inputs.head_VD, inputs.target_T, 1.0, -100, 1, True
            )
            return inputs.results(-nll_T, entropy_T)

        return run

    name = _versioned("Liger LigerFusedLinearScaledCrossEntropyFunction", "liger-kernel")
    requirement = "liger-kernel[cutedsl]>=0.8.5" if inputs.hidden_TD.is_cuda else "liger-kernel>=0.8.5"
    # its tests of the forward pass: rtol 5e-2, for an entropy in bfloat16
    return Side(name, load, requirement, tolerance=5e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 0.0)


def liger_cross_entropy(inputs: HeadInputs) -> Side:
    def load() -> Run:
        module = importlib.import_module("liger_kernel.transformers.functional")

        def run() -> Tensors:
            return inputs.results(
                -module.liger_fused_linear_cross_entropy(
                    inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none"
                )
            )

        return run

    name = _versioned("Liger liger_fused_linear_cross_entropy", "liger-kernel")
    # its tests: rtol 5e-2 in bfloat16, 5e-4 in float32
    return Side(name, load, "liger-kernel>=0.8.5", tolerance=5e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 5e-4)


def cut_cross_entropy(inputs: HeadInputs) -> Side:
    def load() -> Run:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

        def run() -> Tensors:
            return inputs.results(-function(inputs.hidden_TD, inputs.head_VD, inputs.target_T, reduction="none"))

        return run

    name = _versioned("cut-cross-entropy linear_cross_entropy", "cut-cross-entropy")
    # its tests: 1e-2 in bfloat16, 5e-4 in float32
    return Side(name, load, "cut-cross-entropy", tolerance=1e-2 if inputs.hidden_TD.dtype == torch.bfloat16 else 5e-4)


def floor_ms(shape: HeadShape, device: torch.device) -> float | None:
    """Time of the three products at the device's peak; None when the device is not known or the dtype is not bfloat16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    if peak is None or shape.dtype != torch.bfloat16:
        return None
    return 6 * shape.num_tokens * shape.hidden_size * shape.vocab_size / peak * 1000


def head_comparisons(shape: HeadShape, device: torch.device) -> Iterator[Comparison]:
    inputs = head_inputs(shape, device)
    truth, truth_alone, dlogits_TV = head_truths(inputs)
    both = partial(Comparison, "linear_logprob", str(shape), shape.dtype_name, truth=truth)
    alone = partial(
        Comparison, "linear_logprob", f"{shape}, log-prob only", shape.dtype_name, truth=truth_alone,
        ours=our_head(inputs, has_entropy=False),
    )  # fmt: skip
    ours, bare = our_head(inputs), bare_products(inputs, dlogits_TV)
    yield both(ours=ours, peer=bare, target=shape.target)
    if shape.has_modes:
        for label, options in modes(shape):
            comparison = both(ours=our_head(inputs, label, **options), peer=bare)
            yield comparison._replace(case=f"{shape}, {label}", note=f"logit std {LOGIT_STD:g}")
    bound = floor_ms(shape, device)
    if bound is not None:
        yield both(ours=ours, peer=Side("roofline of three products", lambda: dict, bound_ms=bound))
    yield both(ours=ours, peer=float32_softmax(inputs), target=SOFTMAX_TARGET)
    yield alone(peer=torch_chunks(inputs, ""))
    if shape.has_default_chunks:
        yield alone(peer=torch_chunks(inputs, "default chunks"))
    for policy in ("compact", "accurate"):
        label = f"chunks of 256, {policy}"
        yield alone(peer=torch_chunks(inputs, label, batch_chunk_size=256, chunking_method=None, acc_policy=policy))
    yield both(ours=ours, peer=trl_chunks(inputs))
    yield alone(peer=liger_chunks(inputs))
    yield both(ours=ours, peer=liger_scaled(inputs))
    if device.type == "cuda":
        yield alone(peer=liger_cross_entropy(inputs))
        yield alone(peer=cut_cross_entropy(inputs))


def modes(shape: HeadShape) -> list[tuple[str, dict[str, Any]]]:
    """Budgets that make all logits be kept, cut into wide and narrow slabs of the vocabulary, and cut both ways; exact products."""
    num_bytes = shape.num_tokens * shape.vocab_size * shape.dtype.itemsize
    narrowest = shape.num_tokens * 512 * shape.dtype.itemsize  # linear_logprob's narrowest slab
    budgets = {"STORE": num_bytes, "SLAB": num_bytes // 3, "narrow SLAB": 2 * narrowest, "NOBUF": narrowest // 2}
    by_budget = [
        (f"{name}, max_bytes={budget / MIB:.3g} MiB", {"max_bytes": budget}) for name, budget in budgets.items()
    ]
    return [*by_budget, ("precise=True", {"precise": True})]


# ------------------------------------------------------------------------------------------------------- the other ops


def against_formula(
    op: str, case: str, inputs: Sequence[Tensor], ours: Callable[..., Callable[..., Tensors]],
    formula: Callable[..., Tensors], note: str = "",
) -> Comparison:  # fmt: skip
    """Our op against eager PyTorch of the same formula, which in float64 is the truth. `ours` is called to import the op."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    want, got = formula(*exact), formula(*inputs)
    truth = Truth(want, {name: error_of(name, got[name], want[name]) for name in want})
    peer = Side(f"eager formula, torch {torch.__version__}", lambda: partial(formula, *inputs))
    side = Side("default", lambda: partial(ours(), *inputs))
    return Comparison(op, case, str(inputs[0].dtype).removeprefix("torch."), side, peer, truth, note=note)


def boundaries(num_tokens: int, num_sequences: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """cu_seqlens [S + 1] of sequences of random lengths."""
    cuts = torch.randperm(num_tokens - 1, generator=generator, device=device)[: num_sequences - 1] + 1
    ends = torch.tensor([0, num_tokens], device=device)
    return torch.cat([ends[:1], cuts.sort().values, ends[1:]])


def advantage_comparisons(num_tokens: int, num_sequences: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    cu_seqlens_S1 = boundaries(num_tokens, num_sequences, generator, device)
    outcome_S = torch.rand(num_sequences, generator=generator, device=device)
    value_TS = torch.rand(num_tokens + num_sequences, generator=generator, device=device)

    def ours() -> Callable[..., Tensors]:
        from tempo_kernels.advantage import advantage

        return lambda outcome_S, value_TS, cu_seqlens_S1: {"advantage": advantage(outcome_S, value_TS, cu_seqlens_S1)}

    def formula(outcome_S: Tensor, value_TS: Tensor, cu_seqlens_S1: Tensor) -> Tensors:
        is_baseline_TS = torch.ones_like(value_TS, dtype=torch.bool)
        is_baseline_TS[cu_seqlens_S1[1:] + torch.arange(len(outcome_S), device=outcome_S.device)] = False
        return {"advantage": outcome_S.repeat_interleave(cu_seqlens_S1.diff()) - value_TS[is_baseline_TS]}

    case = f"T={num_tokens} S={num_sequences}, no gradient"
    yield against_formula("advantage", case, [outcome_S, value_TS, cu_seqlens_S1], ours, formula)


def policy_loss_comparisons(num_tokens: int, num_sequences: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, num_tokens, generator=generator, device=device)
    old_logprob_T, advantage_T = -draw().abs(), draw()
    logprob_T = (old_logprob_T + 0.2 * draw()).requires_grad_()
    weight_T = torch.full_like(advantage_T, 1 / num_tokens)
    cu_seqlens_S1 = boundaries(num_tokens, num_sequences, generator, device)

    def ours() -> Callable[..., Tensors]:
        from tempo_kernels.policy_loss import policy_loss

        def run(logprob_T: Tensor, *others: Tensor) -> Tensors:
            total, metrics = policy_loss(logprob_T, *others, kind="ppo")
            names = {"pg_clipfrac": metrics["actor/pg_clipfrac"], "ppo_kl": metrics["actor/ppo_kl"]}
            return {"total": total.detach(), **names, "d_logprob": torch.autograd.grad(total, logprob_T)[0]}

        return run

    def formula(
        logprob_T: Tensor, old_logprob_T: Tensor, advantage_T: Tensor, weight_T: Tensor, _: Tensor
    ) -> Tensors:  # fmt: skip
        ratio_T = (logprob_T - old_logprob_T).exp()
        plain_T, clipped_T = -advantage_T * ratio_T, -advantage_T * ratio_T.clamp(0.8, 1.2)
        total = (weight_T * torch.maximum(plain_T, clipped_T)).sum()
        with torch.no_grad():
            clipfrac, kl = (weight_T * (clipped_T > plain_T)).sum(), (weight_T * (old_logprob_T - logprob_T)).sum()
        (d_logprob,) = torch.autograd.grad(total, logprob_T)
        return {"total": total.detach(), "pg_clipfrac": clipfrac, "ppo_kl": kl, "d_logprob": d_logprob}

    inputs = [logprob_T, old_logprob_T, advantage_T, weight_T, cu_seqlens_S1]
    note = "ours returns all its metrics, the peer two"
    yield against_formula("policy_loss", f"ppo T={num_tokens} S={num_sequences}", inputs, ours, formula, note)


def value_head_comparisons(num_rows: int, hidden_size: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden_ND = draw(num_rows, hidden_size).bfloat16().requires_grad_()
    weight_D = (draw(hidden_size) / hidden_size**0.5).requires_grad_()
    bias = torch.zeros(1, device=device, requires_grad=True)
    return_N = torch.rand(num_rows, generator=generator, device=device)
    weight_N = torch.full_like(return_N, 1 / num_rows)

    def results(total: Tensor, *parameters: Tensor) -> Tensors:
        gradients = torch.autograd.grad(total, parameters)
        return {"total": total.detach(), **dict(zip(("d_hidden", "d_weight", "d_bias"), gradients, strict=True))}

    def ours() -> Callable[..., Tensors]:
        from tempo_kernels.value_head import value_head_loss

        return lambda *inputs: results(value_head_loss(*inputs).total, *inputs[:3])

    def formula(hidden_ND: Tensor, weight_D: Tensor, bias: Tensor, return_N: Tensor, weight_N: Tensor) -> Tensors:
        error_N = hidden_ND.to(weight_D.dtype) @ weight_D + bias - return_N
        return results(0.5 * (weight_N * error_N**2).sum(), hidden_ND, weight_D, bias)

    inputs = [hidden_ND, weight_D, bias, return_N, weight_N]
    note = "ours returns metrics and reliability bins, the peer none"
    yield against_formula("value_head_loss", f"mse N={num_rows} D={hidden_size}", inputs, ours, formula, note)


def gather_logprob_comparisons(num_tokens: int, vocab_size: int, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    logits_TV = (LOGIT_STD * draw(num_tokens, vocab_size)).bfloat16().requires_grad_()
    target_T = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    upstream = [draw(num_tokens), draw(num_tokens)]

    def results(logits_TV: Tensor, logprob_T: Tensor, entropy_T: Tensor) -> Tensors:
        grads = [g.to(logprob_T.dtype) for g in upstream]
        (d_logits,) = torch.autograd.grad([logprob_T, entropy_T], [logits_TV], grads)
        return {"logprob": logprob_T.detach(), "entropy": entropy_T.detach(), "d_logits": d_logits}

    def ours() -> Callable[..., Tensors]:
        # by its path: not every version has it
        gather_logprob = getattr(importlib.import_module("tempo_kernels.logprob"), "gather_logprob")  # noqa: B009

        def run(logits_TV: Tensor, target_T: Tensor) -> Tensors:
            stats = gather_logprob(logits_TV, target_T)
            return results(logits_TV, stats.logprob_T, stats.entropy_T)

        return run

    def formula(logits_TV: Tensor, target_T: Tensor) -> Tensors:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        logp_TV = logits_TV.to(wide).log_softmax(-1)
        logprob_T = logp_TV.gather(-1, target_T[:, None])[:, 0]
        return results(logits_TV, logprob_T, -(logp_TV.exp() * logp_TV).sum(-1))

    yield against_formula("gather_logprob", f"T={num_tokens} V={vocab_size}", [logits_TV, target_T], ours, formula)


def suites(device: torch.device, *, quick: bool) -> list[Suite]:
    shapes = QUICK_HEAD_SHAPES if quick else GPU_HEAD_SHAPES if device.type == "cuda" else HEAD_SHAPES
    num_tokens, num_sequences, hidden_size, vocab_size = (200, 7, 64, 500) if quick else (16384, 64, 1024, 49152)
    heads = [Suite(f"linear_logprob {x} {x.dtype_name}", partial(head_comparisons, x)) for x in shapes]
    return [
        *heads,
        Suite("gather_logprob", partial(gather_logprob_comparisons, min(num_tokens, 256), vocab_size)),
        Suite("advantage", partial(advantage_comparisons, num_tokens, num_sequences)),
        Suite("policy_loss", partial(policy_loss_comparisons, num_tokens, num_sequences)),
        Suite("value_head", partial(value_head_comparisons, min(num_tokens, 4096), hidden_size)),
    ]


# ----------------------------------------------------------------------------------------------------------- reporting


def device_name(device: torch.device | None = None) -> str:
    """Name of the GPU or of the processor."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, `-dirty` when it was changed since; the installed version where there is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # an environment inside somebody else's repository is no checkout of ours
    if git("ls-files", "--error-unmatch", "__init__.py") is not None:
        described = git("describe", "--always", "--dirty", "--exclude=*")
        if described:
            return described
    try:
        return metadata.version("tempo-engine")
    except metadata.PackageNotFoundError:
        return "unknown"


def write_json(path: Path, rows: Sequence[Row], device: torch.device | None = None) -> None:
    """{"device", "commit", "rows"}: what ran where, and every row with its fields in order."""
    content = {"device": device_name(device), "commit": commit(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal; a ratio is ours / theirs, so less is better, memory is in MiB."""
    from rich.table import Table

    result = Table(title="ours against each peer: less is better")
    for heading in ("op and case", "peer", "ours", "theirs", "ratio", "target", "MiB", "peer's", "error", "note"):
        is_text = heading in ("op and case", "peer", "note")
        result.add_column(heading, justify="left" if is_text else "right", overflow="fold")

    def number(x: float | None, form: str = ".3g") -> str:
        return "-" if x is None else format(x, form)

    def mib(x: int | None) -> str:
        return "-" if x is None else f"{x / MIB:.1f}"

    for row in rows:
        colour = "" if row.target is None or row.ratio is None else "[green]" if row.ratio <= row.target else "[red]"
        error = row.error.get("ours", {}).get("logprob")
        times = [f"{x:.4g} {row.unit}" if x is not None else "-" for x in (row.ours, row.theirs)]
        result.add_row(
            f"{row.op} {row.case} {row.dtype}", row.peer, *times,
            colour + number(row.ratio), number(row.target), mib(row.peak_bytes), mib(row.peer_peak_bytes),
            number(error, ".1e"), row.note if row.checked else f"[red]{row.note}",
        )  # fmt: skip
    return result
