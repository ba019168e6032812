"""What a run has shown, in one sentence and a few numbers: said first, before any curve."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tempo_em.report.runs import Run, number
from tempo_em.report.series import accuracy_metric, pass_ks


@dataclass(frozen=True)
class Measure:
    """A number at the loop's start and at its last evaluation: Measure("held out", 0.25, 0.32, "share")."""

    name: str
    start: float | None
    last: float | None
    kind: str = "plain"

    def text(self, value: float | None) -> str:
        if value is None:
            return "\N{EN DASH}"
        if self.kind == "points":
            return f"{100 * value:+.1f} pts"
        return f"{100 * value:.1f}%" if self.kind == "share" else f"{value:.3f}"

    @property
    def before(self) -> str:
        return self.text(self.start)

    @property
    def after(self) -> str:
        return self.text(self.last)

    @property
    def change(self) -> str:
        if self.start is None or self.last is None:
            return ""
        difference = self.last - self.start
        return f"{100 * difference:+.1f} pts" if self.kind in ("share", "points") else f"{difference:+.3f}"


def measures(group: Sequence[Run]) -> list[Measure]:
    """Accuracy, pass@8, held-out accuracy and the critic's calibration, means over the group's runs; those that were measured."""
    sets = group[0].sets
    if not sets:
        return []
    main = sets[0]
    wanted: list[tuple[str, str | None, str]] = [(f"accuracy, {main}", accuracy_metric(group[0], main), "share")]
    k = max((k for k in pass_ks(group[0], main) if k <= 8), default=0)
    if k > 1:
        wanted.append((f"pass@{k}, {main}", f"val-core/{main}/acc/pass@{k}", "share"))
    wanted += [(f"accuracy, {name}", accuracy_metric(group[0], name), "share") for name in sets[1:]]
    wanted += [
        (f"critic's AUROC, {main}", f"val-aux/{main}/critic/auroc", "plain"),
        (f"over-valuation, {main}", f"val-aux/{main}/critic/overvaluation", "points"),
    ]
    found = [Measure(name, *_ends(group, metric), kind) for name, metric, kind in wanted if metric]
    return [measure for measure in found if (measure.start, measure.last) != (None, None)]


def _ends(group: Sequence[Run], metric: str) -> tuple[float | None, float | None]:
    def mean(pick: Callable[[Run], Mapping[str, Any]]) -> float | None:
        values = [number(pick(run).get(metric)) for run in group]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def start(run: Run) -> Mapping[str, Any]:
        return next((row for i, row in run.evaluations if i == 0), {})

    def last(run: Run) -> Mapping[str, Any]:
        return run.evaluations[-1][1] if run.evaluations and run.evaluations[-1][0] > 0 else {}

    return mean(start), mean(last)


def sentence(group: Sequence[Run], name: str) -> str:
    """The verdict on runs of one recipe."""
    done = f"{_progress(group)} of {name}"
    found = measures(group)
    if not found:
        return f"{done}; nothing is evaluated yet; {_alarms(group)}."
    accuracy = found[0]
    if accuracy.last is None:
        return f"{done}: not evaluated since the start, where {accuracy.name} was {accuracy.before}; {_alarms(group)}."
    by_name = {measure.name: measure for measure in found}
    direction = "left" if accuracy.before == accuracy.after else "moved" if accuracy.start is not None else "brought"
    set_name = group[0].sets[0]
    subject = _subject(set_name)
    parts = [f"{done} {direction} accuracy on {subject} {_from_to(accuracy)}"]
    parts += [f"{m.name.split(',')[0]} {_from_to(m)}" for m in found[1:] if m.name.startswith("pass@")]
    parts += [f"held-out accuracy {_from_to(m)}" for m in found if m.name == "accuracy, heldout"]
    return f"{', '.join(parts)}; {_critic(by_name, set_name)}; {_alarms(group)}."


def _subject(set_name: str) -> str:
    return "unlabelled questions" if set_name == "unlabelled" else f"the set {set_name}"


def _from_to(measure: Measure) -> str:
    return f"from {measure.before} to {measure.after}" if measure.start is not None else f"to {measure.after}"


def _progress(group: Sequence[Run]) -> str:
    done, planned = max(run.done for run in group), group[0].planned
    unfinished = any(not run.is_finished for run in group)
    text = f"{done} of {planned} EM iterations" if unfinished and planned is not None else f"{done} EM iterations"
    return text + (f" ({len(group)} runs)" if len(group) > 1 else "")


def _critic(found: Mapping[str, Measure], set_name: str) -> str:
    auroc = found.get(f"critic's AUROC, {set_name}")
    if auroc is None or auroc.last is None:
        return "there is no critic"
    before = f" ({auroc.before} at the start)" if auroc.start is not None else ""
    text = f"the critic tells right from wrong there with an AUROC of {auroc.after}{before}"
    over = found.get(f"over-valuation, {set_name}")
    if over is None or over.last is None:
        return text
    points = 100 * over.last
    return f"{text} and promises {abs(points):.1f} points too {'much' if points >= 0 else 'little'}"


def _alarms(group: Sequence[Run]) -> str:
    if not any(name.startswith("alarm/") for run in group for row in run.iterations for name in row):
        return "alarms were not recorded"
    first: dict[str, list[int]] = {}
    for run in group:
        for alarm, stretches in alarm_stretches(run).items():
            first.setdefault(alarm, []).append(stretches[0][0])
    if not first:
        return "no alarm spoke"
    said = [
        f"{alarm} (iteration {min(at)}{f', in {len(at)} of {len(group)} runs' if len(group) > 1 else ''})"
        for alarm, at in sorted(first.items())
    ]
    return f"alarms that spoke: {', '.join(said)}"


def alarm_stretches(run: Run) -> dict[str, list[tuple[int, int]]]:
    """First and last iteration of each stretch that an alarm was on, for those that were."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in run.iterations:
        at = round(number(row.get("iteration")) or 0)
        for name in row:
            if name.startswith("alarm/") and number(row[name]):
                stretches = found.setdefault(name.removeprefix("alarm/"), [])
                if stretches and stretches[-1][1] == at - 1:
                    stretches[-1] = stretches[-1][0], at
                else:
                    stretches.append((at, at))
    return found


def sentence_of_many(names: Sequence[str], found: Sequence[Sequence[Measure]]) -> str:
    """The verdict on several recipes."""
    ends = [
        (measures[0].last, name, measures[0])
        for name, measures in zip(names, found, strict=True)
        if measures and measures[0].last is not None
    ]
    if not ends:
        return f"{len(names)} recipes; none is evaluated after its start yet."
    ends.sort(key=lambda end: end[0], reverse=True)
    _, name, best = ends[0]
    subject = _subject(best.name.removeprefix("accuracy, "))
    text = f"Of {len(names)} recipes, {name} ends highest, with accuracy on {subject} brought {_from_to(best)}"
    if len(ends) > 1:
        _, name, worst = ends[-1]
        text += f"; {name} ends lowest, {_from_to(worst)}"
    return f"{text}."
