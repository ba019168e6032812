"""What finished cells have measured, and whether they may be compared: pure reading, no model."""

# Shape letters: R = runs (cells) of one arm
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tempo_engine.errors import UserError

from tempo_em.compare.cells import Cell, all_cells, begins_at
from tempo_em.compare.spec import Comparison
from tempo_em.plot import evaluation_points

RESAMPLES = 10_000
Point = dict[str, float]


@dataclass(frozen=True)
class Work:
    """What a cell did in its EM loop up to the iteration that the table looks at."""

    responses: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Evaluations of one cell by EM iteration, 0 being the start: {40: {"unlabelled/mean@16": 0.41, ...}}."""

    points: dict[int, Point]
    work: Work

    def last(self, iteration: int) -> Point:
        return self.points[iteration]

    def best(self, iteration: int) -> Point:
        """Of the evaluations up to `iteration` the one with the highest accuracy on unlabelled questions.

        It takes the hidden answers to find: what a table of best checkpoints shows, not what anyone could choose.
        """
        seen = [point for i, point in sorted(self.points.items()) if 0 < i <= iteration]
        return max(seen, key=lambda point: point[accuracy(point)])


def accuracy(point: Point) -> str:
    """The name of the mean accuracy on unlabelled questions, unlabelled/mean@16 for 16 samples."""
    return next(name for name in point if name.startswith("unlabelled/mean@"))


def read_results(comparison: Comparison, out: Path) -> dict[Cell, Result]:
    """Every cell's result. Raises UserError when arms of one task did unequal work."""
    found: dict[Cell, Result] = {}
    for cell in all_cells(comparison):
        rows = [json.loads(line) for line in (out / cell.name / "metrics.jsonl").read_text().splitlines()]
        points = {i: _plain_names(row) for i, row in evaluation_points(rows)}
        start = begins_at(comparison, cell)
        if start in found:
            points[0] = found[start].points[0]
        if comparison.iterations not in points:
            raise UserError(
                f"{out / cell.name} was not evaluated after {comparison.iterations} iterations; choose an evaluation.every "
                "that divides them"
            )
        found[cell] = Result(dict(sorted(points.items())), _work(rows, comparison.iterations))
    check_equal_work(comparison, found)
    return found


def _plain_names(row: dict[str, Any]) -> Point:
    """val-core/SET/acc/mean@16 and val-aux/SET/critic/auroc as SET/mean@16 and SET/critic/auroc."""
    names = {name: name.split("/", 1)[1].replace("/acc/", "/", 1) for name in row if name.startswith("val-")}
    return {plain: row[name] for name, plain in names.items() if row[name] is not None}


def _work(rows: Sequence[dict[str, Any]], iterations: int) -> Work:
    em = [row for row in rows if row.get("stage") == "em" and row["iteration"] <= iterations]
    return Work(
        responses=sum(round(row["rollout/responses"]) for row in em),
        tokens=sum(round(row["tokens/generated"]) for row in em),
        seconds=sum(row["timing_s/step"] for row in em),
    )


def check_equal_work(comparison: Comparison, found: dict[Cell, Result]) -> None:
    """Raises UserError unless all cells of a task sampled equally many responses, and arms about equally many tokens."""
    for name, task in comparison.tasks.items():
        responses = {cell: result.work.responses for cell, result in found.items() if cell.task == name}
        if len(set(responses.values())) > 1:
            low, high = min(responses, key=responses.__getitem__), max(responses, key=responses.__getitem__)
            raise UserError(
                f"unequal work is not compared: {low.name} sampled {responses[low]} responses, {high.name} {responses[high]}"
            )
        arms = comparison.arms_of(task)
        tokens = {
            arm: np.mean([r.work.tokens for c, r in found.items() if (c.task, c.arm) == (name, arm)]) for arm in arms
        }
        for arm in arms:
            if abs(tokens[arm] / tokens[arms[0]] - 1) > comparison.token_tolerance:
                raise UserError(
                    f"unequal work is not compared: on {name}, {arm} sampled {tokens[arm]:.0f} tokens and {arms[0]} "
                    f"{tokens[arms[0]]:.0f}; token_tolerance allows {comparison.token_tolerance:.0%}"
                )


def interval(values_R: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% percentile-bootstrap interval over runs; (0.5, 0.5, 0.5) for one run of 0.5."""
    values = np.asarray(values_R, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
