"""Signs, from what every iteration logs, that the critic's judgement no longer reaches what the policy has become.

Whether the policy improves on unlabelled questions cannot be seen without their answers. These can: how the critic judges fresh
labelled responses, how many of those are right, and how much faster its promises rise than what can be verified.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tempo_em.cadence import AUROC
from tempo_em.recipe import AlarmsRecipe

ACCURACY, PROMISE = "critic/score/mean", "critic/rewards/unlabelled"


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
        mean = {name: self._mean(name, metrics[name]) for name in (AUROC, ACCURACY, PROMISE) if name in metrics}
        known = {name: value for name, value in mean.items() if value is not None}
        found: dict[str, tuple[bool, str]] = {}
        for alarm, name, drop in (
            ("auroc", AUROC, self.how.auroc_drop),
            ("accuracy", ACCURACY, self.how.accuracy_drop),
        ):
            if name in known and drop is not None:
                best, now = self._best[name], known[name]
                found[alarm] = best - now > drop, f"{name} has fallen from {best:.3f} to {now:.3f}"
        if self.how.promise_gap is not None and {ACCURACY, PROMISE} <= known.keys():
            rises = {name: known[name] - self._first[name] for name in (ACCURACY, PROMISE)}
            is_on = rises[PROMISE] - rises[ACCURACY] > self.how.promise_gap
            found["promise"] = (
                is_on,
                f"{PROMISE} has risen by {rises[PROMISE]:.3f}, {ACCURACY} by {rises[ACCURACY]:.3f}",
            )
        notes = [text for alarm, (is_on, text) in found.items() if is_on and not self._is_on.get(alarm)]
        self._is_on |= {alarm: is_on for alarm, (is_on, _) in found.items()}
        return {f"alarm/{alarm}": float(is_on) for alarm, (is_on, _) in found.items()}, notes

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
