"""Metrics: added up over micro-batches, averaged over optimiser steps, written to metrics.jsonl and shown on the console."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_engine import parallel


class Accumulator:
    """Adds metrics over the micro-batches of a step and over ranks, then averages over steps. Names ending in `_max` keep the
    largest."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor | float] = defaultdict(float)
        self._max: dict[str, Tensor | float] = {}
        self._of_steps: dict[str, float] = defaultdict(float)
        self._steps = 0

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """This rank's part of a step's metrics."""
        for name, value in metrics.items():
            if name.endswith("_max"):
                self._max[name] = max(self._max.get(name, value), value)
            else:
                self._sum[name] = self._sum[name] + value

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """Close an optimiser step, with metrics that exist once a step and are the same on every rank."""
        for name, value in metrics.items():
            if name.endswith("_max"):
                self._max[name] = max(self._max.get(name, value), value)
            else:
                self._of_steps[name] += value
        self._steps += 1

    def means(self) -> dict[str, float]:
        """All ranks must ask."""
        sums, maxima = parallel.sum_metrics(self._sum, self._max)
        steps = max(1, self._steps)
        return {name: value / steps for name, value in (sums | self._of_steps).items()} | maxima


class Clock:
    """Seconds per phase: in total, and since the last `lap`."""

    def __init__(self, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)
        self.on_phase = on_phase

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        self.on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[phase] += seconds
            self._lap[phase] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        lap, self._lap = dict(self._lap), defaultdict(float)
        return lap


class MetricsFile:
    """One JSON object a line, written by the main rank. After a resume the file is cut back to where the checkpoint was taken, so
    no step appears twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, object]) -> None:
        if parallel.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        if parallel.is_main() and self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(min(size, self.size))

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def plain(value: Any) -> Any:
    """The value for JSON, which has no NaN: a metric that does not exist (the AUROC of answers that are all right) is null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
