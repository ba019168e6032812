"""Signs, from what every iteration logs, that the critic's judgement no longer reaches what the policy has become.

Whether the policy improves on unlabelled questions cannot be seen without their answers. These can: how the critic judges fresh
labelled responses, how many of those are right, how much faster its promises rise than what can be verified, and whether an E-step
shuffles its judgement of unlabelled responses while that of labelled ones stands.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tempo_em.cadence import AUROC
from tempo_em.recipe import AlarmsRecipe
from tempo_em.transfer import KEPT_LABELLED, KEPT_UNLABELLED

ACCURACY, PROMISE = "critic/score/mean", "critic/rewards/unlabelled"
WATCHED = (AUROC, ACCURACY, PROMISE, KEPT_LABELLED, KEPT_UNLABELLED)
# By alarm: whether it is on, and the sentence that says so.
Found = dict[str, tuple[bool, str]]


class Alarms:
    """Looks at each iteration of the EM loop in turn; what it remembers follows from their metrics alone."""

    def __init__(self, how: AlarmsRecipe) -> None:
        self.how = how
        self._recent: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._is_on: dict[str, bool] = {}

    def look(self, metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """Metrics alarm/NAME, 1 while it is on, and a sentence for each that has just gone on."""
        mean = {name: self._mean(name, metrics[name]) for name in WATCHED if name in metrics}
        known = {name: value for name, value in mean.items() if value is not None}
        found = {**self._falls(known), **self._gaps(known)}
        notes = [text for alarm, (is_on, text) in found.items() if is_on and not self._is_on.get(alarm)]
        self._is_on |= {alarm: is_on for alarm, (is_on, _) in found.items()}
        return {f"alarm/{alarm}": float(is_on) for alarm, (is_on, _) in found.items()}, notes

    def _falls(self, known: Mapping[str, float]) -> Found:
        """Of what should not fall below the best that it was."""
        found: Found = {}
        for alarm, name, drop in (
            ("auroc", AUROC, self.how.auroc_drop),
            ("accuracy", ACCURACY, self.how.accuracy_drop),
        ):
            if name in known and drop is not None:
                best, now = self._best[name], known[name]
                found[alarm] = best - now > drop, f"{name} has fallen from {best:.3f} to {now:.3f}"
        return found

    def _gaps(self, known: Mapping[str, float]) -> Found:
        """Between labelled and unlabelled responses."""
        found: Found = {}
        if self.how.promise_gap is not None and {ACCURACY, PROMISE} <= known.keys():
            rises = {name: known[name] - self._first[name] for name in (ACCURACY, PROMISE)}
            found["promise"] = (
                rises[PROMISE] - rises[ACCURACY] > self.how.promise_gap,
                f"{PROMISE} has risen by {rises[PROMISE]:.3f}, {ACCURACY} by {rises[ACCURACY]:.3f}",
            )
        if self.how.transfer_gap is not None and {KEPT_LABELLED, KEPT_UNLABELLED} <= known.keys():
            labelled, unlabelled = known[KEPT_LABELLED], known[KEPT_UNLABELLED]
            found["transfer"] = (
                labelled - unlabelled > self.how.transfer_gap,
                "labels do not reach the unlabelled questions: "
                f"{KEPT_UNLABELLED} is {unlabelled:.3f}, {KEPT_LABELLED} {labelled:.3f}",
            )
        return found

    def _mean(self, name: str, value: float | None) -> float | None:
        """Over the last `window` iterations; None before there are as many. What was not defined (NaN, or null in the file: the
        AUROC of answers that are all right) is passed over."""
        recent = self._recent.setdefault(name, deque(maxlen=self.how.window))
        if value is not None and not math.isnan(value):
            recent.append(value)
        if len(recent) < self.how.window:
            return None
        mean = fmean(recent)
        self._first.setdefault(name, mean)
        self._best[name] = max(self._best.get(name, mean), mean)
        return mean
