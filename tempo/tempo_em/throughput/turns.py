"""A stack's steps, one at a time: each begins when it is told to, and says afterwards what it took and what was done."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Facts:
    """What a step did. `rows`: prompt and number of response tokens of each row that it trained on, in any order."""

    rows: Sequence[tuple[Sequence[int], int]]
    generated: int  # response tokens sampled
    trained: int  # response tokens in the loss
    updates: int  # optimiser steps
    loss: float
    grad_norm: float
    peak_bytes: int | None = None  # the most held at once beyond what was held before, where another process holds it

    def work(self) -> dict[str, Any]:
        """What must be the same on all sides."""
        rows = sorted((list(map(int, prompt)), int(length)) for prompt, length in self.rows)
        digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()
        return {"rows": digest, "generated": self.generated, "trained": self.trained, "updates": self.updates}


class Enough(Exception):
    """No more turns, for a trainer that has its own loop."""


class Turns:
    """`while turns.go(): ... turns.done(facts)`.

    Args:
        commands: a step is begun at each "go"; anything else, or no more, ends them.
        report: gets what a step took, and its facts.
    """

    def __init__(self, commands: Iterable[str], report: Callable[[dict[str, Any]], None]) -> None:
        self.commands: Iterator[str] = iter(commands)
        self.report = report
        self.count = -1
        self.generating = 0.0
        self.clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def go(self) -> bool:
        """Wait for the next step; its clocks start. False when there is none."""
        if next(self.commands, "").strip() != "go":
            return False
        self.count += 1
        self.generating = 0.0
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return True

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Inside, responses are sampled: seconds on a GPU, CPU-seconds without."""
        start = self.clock()
        yield
        self.generating += self.clock() - start

    def done(self, facts: Callable[[], Facts]) -> None:
        """The step is over; what it did is looked up off the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}
        found = facts()
        numbers: dict[str, Any] = {"loss": found.loss, "grad_norm": found.grad_norm}
        if found.peak_bytes is not None:
            numbers["peak_bytes"] = found.peak_bytes
        self.report(took | {"generating": self.generating} | found.work() | numbers)
