"""Micro-benchmarks: each op against named peers on the same inputs, in time and in peak memory.

A row is one comparison (`measure`): both sides are checked first, and a side that fails is never timed. `heads` and `ops` say what
is compared, `peers` who computes the same as `linear_logprob`, `report` writes rows down. A peer that is not installed costs its
own rows only; they say how to install it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from tempo_kernels.bench import heads, ops
from tempo_kernels.bench.measure import Checked, Comparison, Row, compare
from tempo_kernels.bench.report import commit, device_name, table, write_json

__all__ = ["Row", "case_names", "commit", "device_name", "run_benchmarks", "table", "write_json"]


class Suite(NamedTuple):
    """All comparisons on the same inputs, which are made when it runs."""

    name: str
    comparisons: Callable[[torch.device], Iterable[Comparison]]


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
    device = device or _default_device()
    all_suites = _suites(device, quick=quick)
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
    return [suite.name for suite in _suites(_default_device(), quick=quick)]


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _suites(device: torch.device, *, quick: bool) -> list[Suite]:
    shapes = heads.QUICK_SHAPES if quick else heads.GPU_SHAPES if device.type == "cuda" else heads.SHAPES
    num_tokens, num_sequences, hidden_size, vocab_size = (200, 7, 64, 500) if quick else (16384, 64, 1024, 49152)
    return [
        *(Suite(f"linear_logprob {x} {x.dtype_name}", partial(heads.head_comparisons, x)) for x in shapes),
        Suite("gather_logprob", partial(ops.gather_logprob_comparison, min(num_tokens, 256), vocab_size)),
        Suite("advantage", partial(ops.advantage_comparison, num_tokens, num_sequences)),
        Suite("policy_loss", partial(ops.policy_loss_comparison, num_tokens, num_sequences)),
        Suite("value_head", partial(ops.value_head_comparison, min(num_tokens, 4096), hidden_size)),
    ]
