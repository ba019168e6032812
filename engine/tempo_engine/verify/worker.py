"""Compares answers by math-verify, in a process that may be killed at any moment: `python -P worker.py SECONDS BYTES`.

Two processes: the keeper loads math-verify once and forks the one that works; when that is killed, hangs or crashes, the keeper
forks the next in milliseconds. A request is a line of JSON, [answer, right answer], the reply a line: 1 or 0. "r" says that a
fresh process listens, "x" that math-verify cannot be loaded. SIGUSR1 to the keeper kills what works. Both end with their standard
input: when the parent ends, in whatever way, or at the latest when what is being compared has used up its time.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

Compare = Callable[[str, str], bool]

# Compared once before the first fork: ANTLR remembers its decisions, and every process begins with these.
WARM_UP = (
    (r"\frac{3}{4}", "0.75"), (r"2\sqrt{3}", r"\sqrt{12}"), ("x = 5", "5"), ("(1, 2)", "(1,2)"), (r"\{1, 2\}", r"\{2, 1\}"),
    ("3x^2 - 1", "-1 + 3x^2"), (r"\pi r^2", r"r^2 \pi"), (r"50\%", "0.5"), (r"x \in [0, 1)", "[0, 1)"), (r"x \le 3", r"x \leq 3"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), ("-7", "7"),
)  # fmt: skip

# What symbols are where expressions are told apart, in 1024ths.
POINTS = (1479, 1243, 1187, 1553)

_child = 0


def main(seconds: float, memory: int) -> int:
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    logging.disable()
    try:
        compare = load()
        for answer, gold in WARM_UP:
            compare(answer, gold)
    except Exception:
        os.write(replies, b"x\n")
        return 1
    signal.signal(signal.SIGUSR1, _kill)
    global _child
    while True:
        _child = os.fork()
        if not _child:
            serve(compare, replies, seconds, memory)
            os._exit(0)
        _, status = os.waitpid(_child, 0)
        _child = 0
        if os.WIFEXITED(status) and not os.WEXITSTATUS(status):
            return 0


def _kill(number: int, frame: object) -> None:
    if _child:
        with suppress(ProcessLookupError):
            os.kill(_child, signal.SIGKILL)


def load() -> Compare:
    from math_verify import LatexExtractionConfig, parse, verify

    for quicken in (_parse_in_two_stages, _tell_apart_by_numbers):
        with suppress(ImportError, AttributeError):  # of another release; it is only slower then
            quicken()

    def parsed(text: str) -> list[Any]:
        # LaTeX only: the extraction of plain expressions would take the last number out of any sentence.
        return parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=0,
        )

    right = lru_cache(maxsize=1024)(parsed)  # asked for once a response of its group

    def compare(answer: str, gold: str) -> bool:
        try:
            return verify(right(gold), parsed(answer), timeout_seconds=0)
        except Exception:  # RecursionError and MemoryError too: what cannot be compared is not right
            return False

    return compare


def _parse_in_two_stages() -> None:
    """ANTLR's quick way of deciding first (SLL): where it succeeds, it gives what the thorough one (LL) gives (Parr, Harwell,
    Fisher 2014, "Adaptive LL(*) parsing"); where it fails, that one decides."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    create = _Latex2Sympy.create_parser

    def create_parser(self: _Latex2Sympy, latex_str: str) -> Any:
        parser: Any = create(self, latex_str)
        whole = parser.math

        def math() -> Any:
            parser._interp.predictionMode = PredictionMode.SLL
            try:
                return whole()
            except Exception:
                parser.reset()
                parser._interp.predictionMode = PredictionMode.LL
                return whole()

        parser.math = math
        return parser

    _Latex2Sympy.create_parser = create_parser


def _tell_apart_by_numbers() -> None:
    """Two expressions with different values at one point are not the same: no need to simplify their difference, which takes most
    of the time of a wrong answer. Where the numbers say nothing, math-verify decides as ever."""
    from math_verify import grader

    whole = grader.sympy_symbolic_eq

    def equal(a: Any, b: Any) -> bool:
        with suppress(Exception):  # no numbers: matrices, unknown functions, overflows
            if differ(a, b):
                return False
        return whole(a, b)

    grader.sympy_symbolic_eq = equal


def differ(a: Any, b: Any) -> bool:
    """Whether they have clearly different values where every symbol is some positive number that is no integer."""
    from sympy import Rational

    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if any(s.is_integer is not None or s.is_negative or not s.is_commutative for s in symbols):
        return False
    at = {s: Rational(point, 1024) for s, point in zip(symbols, POINTS, strict=False)}
    x, y = (complex(side.xreplace(at).evalf()) for side in (a, b))  # raises where a symbol is left
    return abs(x - y) > 1e-6 * max(1.0, abs(x), abs(y))


def serve(compare: Compare, replies: int, seconds: float, memory: int) -> None:
    """Until standard input ends."""
    with suppress(ValueError, OSError):  # not every system has them
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.write(replies, b"r\n")
    while line := _line():
        _allow(seconds)
        answer, gold = json.loads(line)
        os.write(replies, b"1\n" if compare(answer, gold) else b"0\n")


def _allow(seconds: float) -> None:
    """CPU time for one comparison and not much more: should the parent be gone, this ends a hang (SIGXCPU), even one in C."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _line() -> bytes:
    """The next line; empty at the end. Unbuffered: what a killed process had read ahead would be lost to the next."""
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 65536)
        if not more:
            return b""
        line += more
    return line


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2])))
