"""One comparison: both sides are checked, then timed in turn, and what a pass needs beyond its inputs and results is counted.

Before anything is timed, both sides are held against a reference in a wider dtype: outputs and gradients may be off by twice what
eager PyTorch in the op's own dtype is off, plus 1e-5. A peer that aims lower is held to the tolerance of its own tests, and its
errors stand in the row. A side that fails its check is never timed.

On a CPU a time is CPU time of one thread, the best of several runs; ours and the peer's alternate in one process, so that a drift
of the machine hits both. On a GPU it is the median of `triton.testing.do_bench`. A time is a forward and a backward pass with the
same upstream gradients on both sides.

Peak memory is what a pass holds above its inputs and what it returns (results and gradients), counted at the allocator.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Run = Callable[[], Tensors]

EPS = 1e-5
# Runs of a row alternate until this much time is used and at most REPEATS times; at least TARGET_REPEATS times where there is a
# target to meet. A pass slower than SLOW_SECONDS runs once, while it is checked: the whole ends in five minutes.
SECONDS, REPEATS, TARGET_REPEATS = 2.0, 5, 3
SLOW_SECONDS = 6.0
# A run shorter than this is repeated inside one measurement.
SHORTEST_SECONDS = 0.02
BLOCK, MIB = 2**22, 2**20


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
    install: str = ""  # how to get what `load` and the pass import
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


class Checked(NamedTuple):
    """A side after its check: the pass and what was measured on the way, or the problem."""

    run: Run | None
    seconds: float = 0.0
    peak_bytes: int | None = None
    errors: dict[str, float] = {}  # noqa: RUF012
    problem: str = ""


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
    # by blocks: the whole difference of two gradients would take longer to allocate than to compute
    blocks = zip(got.reshape(-1).split(BLOCK), want.reshape(-1).split(BLOCK), strict=True)
    error = float(torch.stack([largest(x.to(y.dtype) - y) for x, y in blocks]).max())
    return error / max(float(largest(want)), 1e-30) if name.startswith("d_") else error


def largest(x: Tensor) -> Tensor:
    """max |x|, a scalar; NaN when there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def limits(truth: Truth, tolerance: float = 0.0) -> dict[str, float]:
    """The largest error that each output may have."""
    scales = {name: 1.0 if name.startswith("d_") else float(largest(want)) for name, want in truth.values.items()}
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
        return Checked(None, problem=f"{f'not installed: {side.install}' if side.install else 'failed'} ({error})")
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


def best_times(ours: Checked, theirs: Checked, device: torch.device, min_turns: int = 1) -> tuple[float, float, int]:
    """Milliseconds of both sides and how often they were measured, in turn. Not measured are a bound, and again a pass that was
    slow in its check."""
    if device.type == "cuda":
        do_bench = partial(
            importlib.import_module("triton.testing").do_bench, warmup=100, rep=500, return_mode="median"
        )
        turns = [[float(do_bench(x.run)) if x.run else x.seconds * 1000 for x in (ours, theirs)] for _ in range(2)]
        return min(turn[0] for turn in turns), min(turn[1] for turn in turns), len(turns)
    best = [ours.seconds, theirs.seconds]
    sides = [(i, x) for i, x in enumerate((ours, theirs)) if x.run and x.seconds < SLOW_SECONDS]
    start = time.process_time()
    turn = 0
    while turn < REPEATS and (turn < min_turns or time.process_time() - start < SECONDS):
        for i, x in sides:
            assert x.run is not None
            seconds = cpu_seconds(x.run, max(1, math.ceil(SHORTEST_SECONDS / max(x.seconds, 1e-6))))
            best[i] = seconds if turn == 0 else min(best[i], seconds)
        turn += 1
    return best[0] * 1000, best[1] * 1000, turn


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
    our_ms, their_ms, num_turns = best_times(ours, theirs, device, 1 if c.target is None else TARGET_REPEATS)
    notes = [c.note]
    loose = [name for name, e in theirs.errors.items() if e > strict[name]]
    if loose:
        notes.append(f"the peer's {' and '.join(loose)} only within its own tolerance, {c.peer.tolerance:g}")
    if device.type != "cuda" and (theirs.seconds >= SLOW_SECONDS or num_turns == 1):
        notes.append("the peer ran once" if num_turns > 1 else "each was timed once")
    note = "; ".join(x for x in notes if x)
    return row(ours=our_ms, theirs=their_ms, ratio=our_ms / their_ms, checked=True, note=note)
