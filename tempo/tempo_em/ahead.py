"""Sampling ahead: coming iterations are sampled on a thread of their own while earlier ones train: how many bounds staleness."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tempo_engine import parallel
from tempo_engine.cursor import Cursor

from tempo_em.waiting import Sampled

Cursors = dict[str, Cursor[Any]]
Sample = Callable[[int, Cursors], Sampled]


class Ahead:
    """At most `depth` iterations of a stage ahead of the one that trains. On the main rank; the others hear what it took."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._stage = ""
        self._next = 0
        self._cursors: Cursors = {}
        self._coming: dict[int, Future[Sampled]] = {}

    def take(self, stage: str, iteration: int, last: int, cursors: Cursors, sample: Sample) -> Sampled:
        """The rollouts of this iteration; those after it, up to `last`, are begun. `cursors`: where in the data it begins."""
        if stage != self._stage or iteration not in self._coming:
            self.forget()
            self._stage, self._next = stage, iteration
            self._cursors = {name: copy.copy(cursor) for name, cursor in cursors.items()}
        self._begin(iteration, sample)
        sampled = self._coming.pop(iteration).result()
        self._begin(min(iteration + self.depth, last), sample)
        return sampled

    def _begin(self, until: int, sample: Sample) -> None:
        for iteration in range(self._next, until + 1):
            self._coming[iteration] = self._pool.submit(self._alone, sample, iteration)
            self._next = iteration + 1

    def _alone(self, sample: Sample, iteration: int) -> Sampled:
        with parallel.alone():
            return sample(iteration, self._cursors)

    def forget(self) -> None:
        """Drop what was begun; what is being sampled is waited for."""
        for future in self._coming.values():
            future.cancel()
        for future in self._coming.values():
            if not future.cancelled():
                future.exception()
        self._coming = {}

    def close(self) -> None:
        self.forget()
        self._pool.shutdown()
