"""Numbers of runs over EM iterations, as curves: one run, the mean and range over seeds, or means of many iterations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tempo_em.report.runs import Run, number

MOST_POINTS = 150
Points = dict[int, float]


@dataclass(frozen=True)
class Curve:
    """A line and, over several seeds, its range: Curve("unlabelled", [(0, 0.2), (5, 0.4)], [(0, 0.1, 0.3), (5, 0.4, 0.4)]).

    `style`: which colour and dashes; 0 is the accent. `short`: what is written at its end.
    """

    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    style: int = 0
    short: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.short is None else self.short


def over_seeds(name: str, runs: Sequence[Points], style: int = 0, short: str | None = None) -> Curve:
    """The mean at each iteration that every run has measured, and its lowest and highest value where there are several runs.

    Where they have no iteration in common (one has only begun), that of each iteration's runs.
    """
    measured = [run for run in runs if run]
    common = set.intersection(*(set(run) for run in measured)) if measured else set()
    where = sorted(common or {x for run in measured for x in run})
    at = {x: [run[x] for run in measured if x in run] for x in where}
    points = [(float(x), fmean(values)) for x, values in at.items()]
    band = [(float(x), min(values), max(values)) for x, values in at.items()] if len(measured) > 1 else []
    return Curve(name, points, band, style, short)


def evaluated(run: Run, metric: str) -> Points:
    """An evaluation metric by EM iteration: evaluated(run, "val-core/unlabelled/acc/mean@16")."""
    return _numbers((i, row.get(metric)) for i, row in run.evaluations)


def iterated(run: Run, read: str | Callable[[Mapping[str, Any]], float | None]) -> Points:
    """A metric of the EM loop's iterations, by its name or as a function of the row; many iterations as means of neighbours."""
    get = read if callable(read) else lambda row: row.get(read)
    return thinned(_numbers((row.get("iteration"), get(row)) for row in run.iterations))


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: means of as many neighbours each, at the last of them."""
    step = -(-len(points) // most)
    if step <= 1:
        return points
    where = list(points)
    return {
        where[min(i + step, len(where)) - 1]: fmean(points[x] for x in where[i : i + step])
        for i in range(0, len(where), step)
    }


def _numbers(pairs: Any) -> Points:
    found = ((number(x), number(value)) for x, value in pairs)
    return {round(x): value for x, value in found if x is not None and value is not None}


def accuracy_metric(run: Run, set_name: str, kind: str = "mean@") -> str | None:
    """Name of the mean@k (maj@k) with the most samples of a set."""
    prefix = f"val-core/{set_name}/acc/{kind}"
    names = {name for _, row in run.evaluations for name in row if name.startswith(prefix)}
    return max(names, key=lambda name: _k(name), default=None)


def pass_ks(run: Run, set_name: str) -> list[int]:
    """Every k of pass@k of a set."""
    prefix = f"val-core/{set_name}/acc/pass@"
    return sorted({_k(name) for _, row in run.evaluations for name in row if name.startswith(prefix)} - {0})


def _k(name: str) -> int:
    k = name.rpartition("@")[2]
    return int(k) if k.isascii() and k.isdigit() else 0


def ratio(row: Mapping[str, Any], over: Sequence[str], under: Sequence[str]) -> float | None:
    """Sum of some metrics over the sum of others; None where either is missing or zero."""
    top, bottom = (sum(number(row.get(name)) or 0.0 for name in names) for names in (over, under))
    return top / bottom if top and bottom else None
