"""One case: each stack's memory is measured and what it computes is checked, then their steps are timed in turn.

A stack counts only when its first gradients, on given responses, are those of a plain padded step; a comparison counts only when
both sides were seen to do the same work in every step: the same prompts with responses of the same lengths, the same numbers of
tokens sampled and trained on, of optimiser steps.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tempo_em.throughput.cases import CASES, Bench
from tempo_em.throughput.process import MALLOC, Failed, Process
from tempo_em.throughput.stacks import STACKS
from tempo_em.throughput.work import Case, SamplerName

OURS = "engine"
# Of the relative difference from a plain step's gradients in float32: of any parameter's; in bfloat16 of all of them together.
# There every side is off, and in a model of 30 layers even the plain step's worst parameter by 0.2. A GPU's attention sums its
# gradients in no fixed order.
LIMITS = {"float32": 1e-4 if torch.cuda.is_available() else 1e-5, "bfloat16": 0.1}
ROUNDS = 5  # that count; one before them does not
WORK = ("rows", "generated", "trained", "updates")

Step = dict[str, Any]
Pythons = Mapping[str, str]  # stack: interpreter
HERE: Pythons = MappingProxyType({})  # this one for all


@dataclass(frozen=True, slots=True)
class Row:
    """Ours against one peer. Speeds are response tokens trained on per CPU-second (on a GPU: per second) of whole steps; `ratio` is
    ours / theirs, so more is better. `wall` has both sides' seconds a step, `generating` the share of the time spent sampling."""

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
    memory_ratio: float | None = None
    target: float | None = None
    memory_target: float | None = None
    quartiles: list[list[float]] = field(default_factory=list)
    repeats: int = 0
    tokens: int = 0  # of a step
    wall: list[float] = field(default_factory=list)
    generating: list[float] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)  # of gradients
    is_ours_right: bool = True
    note: str = ""
    sampler: SamplerName = "local"  # ours


def measure(
    name: str, *, quick: bool = False, sampler: SamplerName = "local", pythons: Pythons = HERE,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:  # fmt: skip
    """A row for each peer of the case. `pythons`: the interpreters of stacks that live in environments of their own."""
    bench = CASES[name]
    case = replace(bench.build(quick), sampler=sampler)
    problems = {stack: missing(stack, case, pythons) for stack in (OURS, *bench.peers)}
    errors, peaks = look(case, bench, problems, pythons, progress)
    steps = {} if problems[OURS] else in_turn(case, problems, 1 if quick else ROUNDS, pythons, progress)
    return [row(case, bench, peer, problems, errors, steps, peaks) for peer in bench.peers]


def missing(stack: str, case: Case, pythons: Pythons) -> str:
    """What the stack lacks in its interpreter, in one sentence; empty when it can run."""
    if stack not in pythons:
        return STACKS[stack].missing()
    try:
        with Process("missing", stack, case, python=pythons[stack]) as one:
            return one.ask()["missing"]
    except Failed as failure:
        return f"{failure}; {pythons[stack]} needs tempo-engine as well (pip install --no-deps)"


# --- Checks ------------------------------------------------------------------------------------------------------------------


def look(
    case: Case, bench: Bench, problems: dict[str, str], pythons: Pythons, progress: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, int]]:
    """Each stack's relative error of its gradients, and the bytes that a fresh process's first step takes at its highest
    beyond what was in use before it. What is wrong with a stack is written into `problems`."""
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    truth: dict[str, Tensor] | None = None
    reference = bench.reference
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moments.safetensors"
        for stack in sorted(problems, key=lambda stack: stack != reference):
            if problems[stack]:
                continue
            if truth is None and stack != reference:
                problems[stack] = f"nothing to check it with: {reference} {problems[reference]}"
                continue
            progress(f"{case.name}: checking {stack}")
            try:
                if truth is None and case.dtype != "float32":
                    _, truth = said("check", stack, replace(case, dtype="float32"), path, pythons)
                first, moments = said("look", stack, case, path, pythons)
            except Failed as failure:
                problems[stack] = str(failure)
                continue
            truth = moments if truth is None else truth
            error = (largest_difference if case.dtype == "float32" else whole_difference)(moments, truth)
            if not error <= LIMITS[case.dtype]:  # nan too
                problems[stack] = f"wrong: its gradients are off by {error:.2g} (limit {LIMITS[case.dtype]:g})"
            errors |= {stack: error} if np.isfinite(error) else {}
            peaks[stack] = first["peak_bytes"]
    return errors, peaks


def said(kind: str, stack: str, case: Case, path: Path, pythons: Pythons) -> tuple[Step, dict[str, Tensor]]:
    """What a process said first, and the moments that it left: of AdamW after one step on given responses, a tenth of the clipped
    gradient, by parameter."""
    with Process(
        kind, stack, case, str(path), python=pythons.get(stack), environment=MALLOC
    ) as one:  # fmt: skip
        first = one.ask()
        one.finish()
    moments = load_file(path)
    path.unlink()
    return first, moments


def largest_difference(tensors: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Of any tensor: norm of the difference over its norm. NaN when there is one, infinite when names differ."""
    if tensors.keys() != truth.keys():
        return float("inf")
    relative = [(tensors[name].view_as(want) - want).norm() / want.norm() for name, want in truth.items()]
    return float(torch.stack(relative).max())


def whole_difference(tensors: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The same of all tensors as one."""
    if tensors.keys() != truth.keys():
        return float("inf")
    squares = [((tensors[name].view_as(want) - want).norm() ** 2, want.norm() ** 2) for name, want in truth.items()]
    off, size = (torch.stack(column).sum() for column in zip(*squares, strict=True))
    return float((off / size).sqrt())


# --- Times -------------------------------------------------------------------------------------------------------------------


def in_turn(
    case: Case, problems: dict[str, str], rounds: int, pythons: Pythons, progress: Callable[[str], None]
) -> dict[str, list[Step]]:
    """Every right stack's steps: one of each in turn, again and again, so that a drift of the machine hits all. Each starts, and
    makes a step that does not count, before the next one does: on a GPU samplers measure at their start what is free."""
    steps: dict[str, list[Step]] = {stack: [] for stack, problem in problems.items() if not problem}
    processes: dict[str, Process] = {}
    with ExitStack() as running:
        for turn in range(rounds + 1):
            for stack in steps:
                if problems[stack]:
                    continue
                progress(f"{case.name}: {stack}, step {turn} of {rounds}")
                try:
                    if turn == 0:
                        one = Process("steps", stack, case, python=pythons.get(stack))
                        processes[stack] = running.enter_context(one)
                        one.ask()  # it says that it is ready
                    took = processes[stack].ask("go")
                except Failed as failure:
                    problems[stack] = str(failure)
                    continue
                if turn > 0:
                    steps[stack].append(took)
    return steps


def unequal(case: Case, ours: list[Step], theirs: list[Step]) -> str:
    """What a stack did more or less than the other, or than planned; empty when they did the same."""
    for mine, other in zip(ours, theirs, strict=True):
        for name in WORK:
            if mine[name] != other[name]:
                return f"unequal work: {name} {mine[name]} against {other[name]}"
        if mine["generated"] != sum(case.lengths):
            return f"unequal work: {mine['generated']} tokens sampled, {sum(case.lengths)} planned"
    return ""


# --- Rows --------------------------------------------------------------------------------------------------------------------


def row(
    case: Case, bench: Bench, peer: str, problems: Mapping[str, str], errors: Mapping[str, float],
    steps: Mapping[str, list[Step]], peaks: Mapping[str, int],
) -> Row:  # fmt: skip
    """One comparison, or why there is none."""
    is_first = peer == bench.peers[0]
    clock, unit = ("wall", "tokens per second") if case.device.type == "cuda" else ("cpu", "tokens per CPU-second")
    blank = Row(
        "rl_step", case.name, case.dtype, None, peer, None, None, unit, peaks.get(OURS), False,
        target=bench.target if is_first else None, memory_target=bench.memory_target if is_first else None,
        error={stack: errors[stack] for stack in (OURS, peer) if stack in errors},
        is_ours_right=not problems[OURS], sampler=case.sampler,
    )  # fmt: skip
    wrong = [f"{stack}: {problems[stack]}" for stack in (OURS, peer) if problems[stack]]
    if wrong:
        return replace(blank, note="; ".join(wrong))
    difference = unequal(case, steps[OURS], steps[peer])
    if difference:
        return replace(blank, is_ours_right=False, note=difference)
    tokens = steps[OURS][0]["trained"]
    seconds = np.array([[step[clock] for step in steps[stack]] for stack in (OURS, peer)])
    low, middle, high = np.percentile(tokens / seconds, (25, 50, 75), axis=1).tolist()
    return replace(
        blank,
        checked=True,
        ours=middle[0],
        theirs=middle[1],
        ratio=middle[0] / middle[1],
        quartiles=[[low[0], high[0]], [low[1], high[1]]],
        repeats=len(steps[OURS]),
        tokens=tokens,
        wall=[float(np.median([step["wall"] for step in steps[stack]])) for stack in (OURS, peer)],
        generating=[
            float(np.median([step["generating"] / step[clock] for step in steps[stack]])) for stack in (OURS, peer)
        ],
        peer_peak_bytes=peaks[peer],
        memory_ratio=peaks[OURS] / peaks[peer],
        note=STACKS[peer].note,
    )
