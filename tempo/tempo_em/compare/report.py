"""Tables in Markdown and curves as a figure, from the results of a comparison."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tempo_engine.errors import UserError

from tempo_em.compare.cells import iterations_of
from tempo_em.compare.results import Point, Result, Results, accuracy, interval, runs_of
from tempo_em.compare.spec import Comparison

ACCURACY = ("{}/mean@", "{}/pass@8", "{}/maj@", "{}/distinct_answers")
CRITIC = ("critic/auroc", "critic/brier", "critic/ece", "critic/overvaluation")
SHOWN_SETS = ("unlabelled", "heldout")
COLOURS = (
    "#0b6e99", "#d9730d", "#6940a5", "#0f7b6c", "#ad1a72", "#9b9a97", "#b8860b", "#e03e3e", "#37352f", "#5b8def",
)  # fmt: skip
# More arms than colours: the next ones have other markers.
LOOKS = [(colour, marker) for marker in "os^" for colour in COLOURS]


def tables(comparison: Comparison, results: Results) -> str:
    """For each task: what the policy can do, last and best checkpoint, and what the critic's judgement is worth."""
    parts = []
    for name, task in comparison.tasks.items():
        arms = comparison.arms_of(task)
        runs = len(task.bases) * len(task.seeds)
        parts.append(
            f"**{name}** ({_count(runs, 'run')} each: {_count(len(task.bases), 'base')} x {_count(len(task.seeds), 'seed')}; "
            f"after {comparison.iterations} "
            f"iterations; mean and 95% bootstrap interval over runs)\n"
        )
        parts += [_policy_table(results, name, arms), _critic_table(results, name, arms)]
    return "\n".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _policy_table(results: Results, task: str, arms: list[str]) -> str:
    first = arms[0]
    sample = next(result for cell, result in results.items() if cell.task == task).last
    mean = accuracy(sample)
    columns = [name for s in SHOWN_SETS for name in _names(sample, s) if name != mean]
    columns += [name for name in sample if name.startswith("labelled_heldout/mean@")]

    def read(arm: str, point: Callable[[Result], Point], name: str) -> list[float]:
        return _values(results, task, arm, lambda result: point(result)[name])

    start = {name: _cell(read(first, lambda r: r.start, name)) for name in (mean, *columns)}
    rows = [["start", "", start.pop(mean), "", *start.values()]]
    reference = read(first, lambda r: r.last, mean)
    for arm in arms:
        last = read(arm, lambda r: r.last, mean)
        against = "" if arm == first else _cell(np.subtract(last, reference).tolist(), "+.3f")
        row = [arm, against, _cell(last), _cell(read(arm, lambda r: r.best, mean))]
        rows.append(row + [_cell(read(arm, lambda r: r.last, name)) for name in columns])
    titles = [name.replace("_", " ").replace("/", " ") for name in (mean, f"{mean}, best", *columns)]
    return _markdown(["", f"against {first}", *titles], rows)


def _critic_table(results: Results, task: str, arms: list[str]) -> str:
    columns = [f"{s}/{metric}" for s in SHOWN_SETS for metric in CRITIC]

    def values(points: list[Point]) -> list[str]:
        return [_cell([p[c] for p in points]) if all(c in p for p in points) else "" for c in columns]

    rows = [["start", *values([r.start for r in runs_of(results, task, arms[0]).values()]), *[""] * 4]]
    for arm in arms:
        cells = runs_of(results, task, arm).values()
        work = [
            sum(w) / len(cells)
            for w in zip(*((r.work.responses, r.work.tokens, r.work.seconds) for r in cells), strict=True)
        ]
        done = [f"{work[0]:.0f}", f"{work[1] / 1000:.0f}k", f"{work[2]:.0f}"]
        rows.append([arm, *values([r.last for r in cells]), _alarms([r.alarm for r in cells]), *done])
    titles = [c.replace("critic/", "").replace("/", " ") for c in columns]
    return _markdown(["critic", *titles, "first alarm at", "responses", "tokens", "seconds"], rows)


def _alarms(first: list[int | None]) -> str:
    """At which iterations runs raised their first alarm: "12, 15 (2 of 3)"."""
    raised = sorted(i for i in first if i is not None)
    return f"{', '.join(map(str, raised))} ({len(raised)} of {len(first)})" if raised else "none"


def _names(sample: Point, set_name: str) -> list[str]:
    wanted = [pattern.format(set_name) for pattern in ACCURACY]
    return [next(name for name in sample if name.startswith(w)) for w in wanted if any(n.startswith(w) for n in sample)]


def _values(results: Results, task: str, arm: str, read: Callable[[Result], float]) -> list[float]:
    return [read(run) for run in runs_of(results, task, arm).values()]


def _cell(values: Sequence[float], form: str = ".3f") -> str:
    mean, low, high = interval(values)
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_json(comparison: Comparison, results: Results, facts: dict[str, Any]) -> str:
    """Every evaluation of every cell, so that anything else can be computed from it."""
    cells = [
        {
            "task": c.task, "base": c.base, "seed": c.seed, "arm": c.arm, "responses": r.work.responses,
            "tokens": r.work.tokens, "at": r.at, "alarm": r.alarm, "seconds": round(r.work.seconds, 1),
            "points": {i: {name: round(x, 5) for name, x in point.items()} for i, point in r.points.items()},
        }
        for c, r in sorted(results.items())
    ]  # fmt: skip
    return json.dumps({**facts, "comparison": comparison.model_dump(mode="json"), "cells": cells})


def place_in(path: Path, name: str) -> tuple[str, str]:
    """What stands before and behind a comparison's tables in a Markdown file. Raises UserError when nothing marks their place."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise UserError(f"{path} has no place for these tables; put the lines {begin} and {end} into it")
    return f"{before}{begin}\n", f"\n{end}{after}"


def plot(comparison: Comparison, results: Results, path: Path) -> None:
    """A row of axes for each task; beyond the table's last iteration, thin lines of the cells that went on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sample = next(iter(results.values())).last
    mean = accuracy(sample)
    wanted = {mean: "unlabelled: accuracy", "unlabelled/pass@8": "unlabelled: pass@8"}
    wanted |= {
        mean.replace("unlabelled", "heldout"): "held out: accuracy",
        "unlabelled/critic/auroc": "unlabelled: AUROC",
    }
    shown = {name: title for name, title in wanted.items() if any(name in r.last for r in results.values())}
    tasks = list(comparison.tasks)
    size = (4.2 * len(shown) + 2, 3.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(shown), figsize=size, squeeze=False, constrained_layout=True)
    figure.suptitle(comparison.title)
    for row, task in zip(axes, tasks, strict=True):
        for axis, (name, title) in zip(row, shown.items(), strict=True):
            for arm, look, lines in _lines(comparison, results, task, name):
                _draw(axis, lines, arm, look, comparison.iterations)
            axis.set(title=f"{task}, {title}", xlabel="EM iteration")
            axis.grid(alpha=0.25)
    named = [(str(line.get_label()), line) for axis in axes.flat for line in axis.lines]
    lines = {name: line for name, line in named if not name.startswith("_")}
    columns = -(-len(lines) // (20 * len(tasks)))
    figure.legend(lines.values(), lines.keys(), fontsize=7, loc="outside right upper", ncols=columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(
    comparison: Comparison, results: Results, task: str, name: str
) -> Iterator[tuple[str, tuple[str, str], list[dict[int, float]]]]:
    """Arm, its colour and marker, and for each of its cells iteration -> value; arms without the metric are left out."""
    looks = dict(zip(comparison.arms, itertools.cycle(LOOKS), strict=False))  # an arm has one on all tasks
    for arm in comparison.arms_of(comparison.tasks[task]):
        runs = sorted(runs_of(results, task, arm).items(), key=lambda run: iterations_of(comparison, run[0]))
        lines = [{i: p[name] for i, p in result.points.items() if name in p} for _, result in runs]
        if all(lines):
            yield arm, looks[arm], lines


def _draw(axis: Any, lines: list[dict[int, float]], arm: str, look: tuple[str, str], iterations: int) -> None:
    colour, marker = look
    shared = sorted(i for i in set.intersection(*map(set, lines)) if i <= iterations)
    stats = np.array([interval([line[i] for line in lines]) for i in shared]).T
    axis.plot(shared, stats[0], color=colour, label=arm, linewidth=2, marker=marker, markersize=4)
    axis.fill_between(shared, stats[1], stats[2], color=colour, alpha=0.12, linewidth=0)
    for line in lines:
        beyond = [(i, y) for i, y in sorted(line.items()) if i >= iterations]
        if len(beyond) > 1:
            axis.plot(*zip(*beyond, strict=True), color=colour, linewidth=1, linestyle="--")
