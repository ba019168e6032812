"""Comparisons by math-verify in worker processes, each with a time limit: it can hang for ever on what a model writes."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from tempo_engine.errors import Halted, UserError

Pair = tuple[str, str]  # answer, right answer

# Until a worker that was started listens: it imports sympy, perhaps on a busy machine.
START_SECONDS = 120.0
# Workers that end before they listen, one after the other, are no accident.
MAX_STARTS = 3
MAX_CACHED = 100_000
MEMORY_BYTES = 2 << 30


class State(Enum):
    STARTING = "until it listens, at first and after its process was killed"
    IDLE = "listening"
    BUSY = "comparing `pair`"


class Worker:
    """One keeper with its process (see `worker`). Deadlines are on the clock of time.monotonic."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self.pair: Pair | None = None
        self.num_starts = 0
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a terminal's Ctrl-C is the trainer's
        )
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.output, False)
        self.num_starts += 1
        self._begin()

    def _begin(self) -> None:
        self.state, self.deadline = State.STARTING, time.monotonic() + START_SECONDS

    def ask(self, pair: Pair) -> None:
        """Raises BrokenPipeError when it is gone."""
        self.hear()  # a process that was killed while idle has been replaced
        os.write(self.input, json.dumps(pair).encode() + b"\n")
        self.pair, self.state, self.deadline = pair, State.BUSY, time.monotonic() + self.seconds

    def hear(self) -> list[str]:
        """The lines that it wrote. Raises EOFError when it is gone."""
        try:
            said = os.read(self.output, 4096)
        except BlockingIOError:
            return []
        if not said:
            raise EOFError
        return said.decode().split()

    def interrupt(self) -> None:
        """Kill what it works on; its keeper goes on."""
        self.process.send_signal(signal.SIGUSR1)
        self._begin()

    def restart(self) -> None:
        """Raises Halted when it never listened."""
        if self.num_starts >= MAX_STARTS:
            raise Halted(
                "processes that compare answers end before they begin; look for what kills them, memory perhaps"
            )
        self.kill()
        self._start()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


class Pool:
    """At most `workers` of them, started when there is something to compare. Any thread may ask.

    A comparison that takes `seconds` of wall-clock time is worth 0, and costs its worker's process; so does a crash, after a second
    try. Results are kept, the last 100,000.
    """

    def __init__(self, workers: int = 2, *, seconds: float = 1.0, memory: int = MEMORY_BYTES) -> None:
        self.limit, self.seconds, self.memory = workers, seconds, memory
        self.workers: list[Worker] = []
        self._known: OrderedDict[Pair, float] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._lock = threading.Lock()

    def compare(self, pairs: Sequence[Pair]) -> list[float]:
        """1.0 for each answer that equals the right answer beside it, else 0.0.

        Raises UserError without math-verify, Halted when its processes don't begin.
        """
        with self._lock:
            new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
            try:
                results = self._work(new)
            except BaseException:  # workers that owe replies to nobody
                self._kill()
                raise
            self._counts.update({"verify/compared": len(new), "verify/cached": len(pairs) - len(new)})
            found = [results[pair] if pair in results else self._known[pair] for pair in pairs]
            for pair in dict.fromkeys(pairs):
                self._known[pair] = results[pair] if pair in results else self._known[pair]
                self._known.move_to_end(pair)
            while len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
            return found

    def metrics(self) -> dict[str, float]:
        """Since the last call: comparisons made, taken from those kept, that took too long, whose process crashed."""
        counts, told = self._counts.copy(), self._told
        self._told = counts
        names = [f"verify/{name}" for name in ("compared", "cached", "timeouts", "crashes")]
        return {name: float(counts[name] - told[name]) for name in names}

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _work(self, pairs: list[Pair]) -> dict[Pair, float]:
        waiting, results = deque(pairs), dict[Pair, float]()
        failed: set[Pair] = set()

        def crashed(worker: Worker) -> None:
            pair, worker.pair = worker.pair, None
            if pair in failed:
                results[pair] = 0.0
                self._counts["verify/crashes"] += 1
            elif pair is not None:
                failed.add(pair)
                waiting.appendleft(pair)

        while len(results) < len(pairs):
            self._hand_out(waiting, crashed)
            for worker in self._until_something_happens():
                try:
                    lines = worker.hear()
                except EOFError:
                    crashed(worker)
                    worker.restart()
                    continue
                for line in lines:
                    if line == "x":
                        raise UserError(
                            "verifier expression needs math-verify, which cannot be imported: pip install math-verify"
                        )
                    if line == "r":
                        crashed(worker)
                        worker.state, worker.num_starts = State.IDLE, 0
                    elif worker.state is State.BUSY and worker.pair is not None:
                        results[worker.pair] = float(line == "1")
                        worker.state, worker.pair = State.IDLE, None
            self._stop_what_is_late(results)
        return results

    def _hand_out(self, waiting: deque[Pair], crashed: Callable[[Worker], None]) -> None:
        while waiting and len(self.workers) < min(
            self.limit, len(waiting) + sum(w.pair is not None for w in self.workers)
        ):
            self.workers.append(Worker(self.seconds, self.memory))
        for worker in self.workers:
            if waiting and worker.state is State.IDLE:
                try:
                    worker.ask(waiting[0])
                    waiting.popleft()
                except (BrokenPipeError, EOFError):
                    worker.restart()

    def _until_something_happens(self) -> list[Worker]:
        """Workers that wrote something, as soon as there are any or a deadline has passed."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            due = min(w.deadline for w in self.workers if w.state is not State.IDLE)
            return [key.data for key, _ in selector.select(max(0.0, due - time.monotonic()))]

    def _stop_what_is_late(self, results: dict[Pair, float]) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if worker.state is State.IDLE or now < worker.deadline:
                continue
            if worker.state is State.STARTING:
                worker.restart()
            elif worker.pair is not None:
                results[worker.pair], worker.pair = 0.0, None
                self._counts["verify/timeouts"] += 1
                worker.interrupt()
