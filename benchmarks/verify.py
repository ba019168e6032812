"""Comparisons by the pool of killable workers against math-verify called in this process, as one writes it first.

`python benchmarks/verify.py [--count N]`: the same pairs on both sides, verdicts compared first, then CPU-seconds of both, in turn.
A pool's CPU time is that of this process and of its one worker; starting it is not counted. What a hang costs is wall-clock time.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import psutil
from tempo_engine.verify.pool import Pair, Pool

ROUNDS = 5


def easy_pairs(count: int, seed: int) -> list[Pair]:
    """Answers to competition questions, right and wrong, eight to a question; none is settled by comparing strings."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        a, b, c = rng.randint(2, 99), rng.randint(2, 9), rng.randint(2, 9)
        kinds = [
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a * c}}}{{{b * c}}}", rf"\frac{{{a + 1}}}{{{b}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * b}}}"),
            (str(a), f"x = {a}", f"x = {a + 1}"),
            (str(a / 4), rf"\frac{{{a}}}{{4}}", rf"\frac{{{a}}}{{8}}"),
            (f"({a}, {b})", rf"( {a},\,{b} )", f"({b}, {a + 1})"),
            (f"{a}x + {b}", f"{b} + {a}x", f"{a}x - {b}"),
        ]
        gold, right, wrong = rng.choice(kinds)
        pairs += [(f"{rng.choice((right, wrong))}{' ' * n}", gold) for n in range(8)]
    return pairs[:count]


def direct(pairs: list[Pair]) -> list[float]:
    """What one writes first: both sides parsed each time, with math-verify's own time limits."""
    from math_verify import parse, verify

    return [float(verify(parse(f"${gold}$"), parse(f"${answer}$"))) for answer, gold in pairs]


def worker_seconds(pool: Pool) -> float:
    """CPU time so far of what compares, without its keeper."""
    spent = [child.cpu_times() for w in pool.workers for child in psutil.Process(w.process.pid).children()]
    return sum(s.user + s.system for s in spent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600, help="pairs a round")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    pool = Pool(1, seconds=20.0)
    pool.compare([("x", "x + 0")])
    direct([("x", "x + 0")])
    spent: dict[str, list[float]] = {"pool": [], "direct": [], "worker": []}
    for round_ in range(ROUNDS):
        pairs = easy_pairs(arguments.count, seed=round_)
        start, begun = time.process_time(), worker_seconds(pool)
        ours = pool.compare(pairs)
        worker = worker_seconds(pool) - begun
        spent["worker"].append(worker)
        spent["pool"].append(time.process_time() - start + worker)
        start = time.process_time()
        theirs = direct(pairs)
        spent["direct"].append(time.process_time() - start)
        if ours != theirs or not 0.2 < statistics.mean(ours) < 0.8:
            print(
                "the two sides disagree; nothing is reported",
                [p for p, a, b in zip(pairs, ours, theirs, strict=True) if a != b][:3],
            )
            return 1
    pool.close()
    median = {name: statistics.median(seconds) for name, seconds in spent.items()}
    figures = {
        "checks per CPU-second of a worker": arguments.count / median["worker"],
        "checks per CPU-second, worker and parent": arguments.count / median["pool"],
        "checks per CPU-second, called directly": arguments.count / median["direct"],
        "CPU time, pool / direct": median["pool"] / median["direct"],
        "seconds that a hang costs": hang(),
    }
    for name, value in figures.items():
        print(f"{name:42} {value:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures, "seconds": spent}, indent=1), encoding="utf-8")
    return 0


def hang() -> float:
    """Wall-clock seconds of a comparison that never ends and the next one on the same worker, without the latter's own."""
    pool = Pool(1)
    pool.compare([("x", "x + 0")])
    start = time.monotonic()
    pool.compare([("9^{9^{9^9}}", "7"), ("x + 1", "1 + x")])
    hanging = time.monotonic() - start
    pool.close()
    return hanging


if __name__ == "__main__":
    sys.exit(main())
