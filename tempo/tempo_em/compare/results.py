"""What finished cells have measured, and whether they may be compared: pure reading, no model."""

# Shape letters: R = runs (cells) of one arm
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tempo_engine.errors import UserError
from tempo_engine.tracking import MetricsFile

from tempo_em.compare.cells import Cell, all_cells, begins_at
from tempo_em.compare.spec import Comparison
from tempo_em.plot import evaluation_points

RESAMPLES = 10_000
Point = dict[str, float]


@dataclass(frozen=True)
class Work:
    """What an EM loop has done by one of its iterations."""

    responses: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Evaluations of one cell by EM iteration, 0 being the start: {40: {"unlabelled/mean@16": 0.41, ...}}. The table shows the one
    at iteration `at`, by which the cell had done `work`; `alarm`: the first iteration until then that raised one (tempo_em.alarms).
    """

    points: dict[int, Point]
    at: int
    work: Work
    alarm: int | None

    @property
    def start(self) -> Point:
        return self.points[0]

    @property
    def last(self) -> Point:
        return self.points[self.at]

    @property
    def best(self) -> Point:
        """Of the evaluations up to the last one the one with the highest accuracy on unlabelled questions.

        It takes the hidden answers to find: what a table of best checkpoints shows, not what anyone could choose.
        """
        seen = [point for i, point in sorted(self.points.items()) if 0 < i <= self.at]
        return max(seen, key=lambda point: point[accuracy(point)])


def accuracy(point: Point) -> str:
    """The name of the mean accuracy on unlabelled questions, unlabelled/mean@16 for 16 samples.

    Raises UserError where they have no answers: nothing says then which arm is better.
    """
    names = [name for name in point if name.startswith("unlabelled/mean@")]
    if not names:
        raise UserError(
            "the unlabelled questions have no answers, which a comparison needs for its audit; name their column"
        )
    return names[0]


Results = dict[Cell, Result]


def runs_of(results: Results, task: str, arm: str) -> dict[Cell, Result]:
    """An arm's runs on a task, in the order of bases and seeds, alike for every arm."""
    return {cell: results[cell] for cell in sorted(results) if (cell.task, cell.arm) == (task, arm)}


def read_results(comparison: Comparison, out: Path) -> Results:
    """Every cell's result, for equal work: that of the first arm on the task after comparison.iterations, for the others at the
    last evaluation by which they had sampled no more responses (methods that replace groups sample more in an iteration).

    Raises UserError when work cannot be made equal.
    """
    found: Results = {}
    for cell in all_cells(comparison):
        rows = MetricsFile(out / cell.name / "metrics.jsonl").rows()
        points = {i: _plain_names(row) for i, row in evaluation_points(rows)}
        start = begins_at(comparison, cell)
        if start in found and 0 not in points:
            points[0] = found[start].start
        leads = cell.arm == (first := comparison.arms_of(comparison.tasks[cell.task])[0])
        work = _work(rows, comparison.iterations) if leads else found[replace(cell, arm=first)].work
        budget = work.responses
        within = [i for i in points if 0 < i <= comparison.iterations and _work(rows, i).responses <= budget]
        if not within or (leads and comparison.iterations not in within):
            raise UserError(
                f"{out / cell.name} was not evaluated after {comparison.iterations} iterations; choose an evaluation.every "
                "that divides them"
            )
        at = max(within)
        found[cell] = Result(dict(sorted(points.items())), at, _work(rows, at), _first_alarm(rows, at))
    check_equal_work(comparison, found)
    return found


def _plain_names(row: Mapping[str, Any]) -> Point:
    """val-core/SET/acc/mean@16 and val-aux/SET/critic/auroc as SET/mean@16 and SET/critic/auroc."""
    names = {name: name.split("/", 1)[1].replace("/acc/", "/", 1) for name in row if name.startswith("val-")}
    return {plain: row[name] for name, plain in names.items() if row[name] is not None}


def _em_rows(rows: Sequence[dict[str, Any]], iterations: int) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("stage") == "em" and row["iteration"] <= iterations]


def _work(rows: Sequence[dict[str, Any]], iterations: int) -> Work:
    em = _em_rows(rows, iterations)
    return Work(
        responses=sum(round(row["rollout/responses"]) for row in em),
        tokens=sum(round(row["tokens/generated"]) for row in em),
        seconds=sum(row["timing_s/step"] for row in em),
    )


def _first_alarm(rows: Sequence[dict[str, Any]], iterations: int) -> int | None:
    alarmed = [
        row["iteration"]
        for row in _em_rows(rows, iterations)
        if any(value for name, value in row.items() if name.startswith("alarm/"))
    ]
    return min(alarmed, default=None)


def check_equal_work(comparison: Comparison, found: Results) -> None:
    """Raises UserError unless the arms of each task sampled about as many responses and tokens as its first one."""
    for name, task in comparison.tasks.items():
        first, *others = comparison.arms_of(task)
        for arm in others:
            for what in ("responses", "tokens"):
                ours, its = (
                    sum(getattr(run.work, what) for run in runs_of(found, name, one).values()) for one in (first, arm)
                )
                if abs(its / ours - 1) > comparison.tolerance:
                    raise UserError(
                        f"unequal work is not compared: on {name}, {arm} sampled {its} {what} and {first} {ours}; "
                        f"tolerance allows {comparison.tolerance:.0%}"
                    )


def interval(values_R: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% percentile-bootstrap interval over runs; (0.5, 0.5, 0.5) for one run of 0.5."""
    values = np.asarray(values_R, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
