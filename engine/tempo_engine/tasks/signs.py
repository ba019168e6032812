"""Signs to target: put a sign before each number so that they add up to the target.

    prompt    3 5 1 2 = (5)
    response  +3 (2) +5 (-3) -1 (-2) -2 (0)

Each step is a signed number and, in brackets, what is still missing: 5 - 3 = 2, 2 - 5 = -3, -3 + 1 = -2, -2 + 2 = 0. The answer
is the signed numbers, "+3+5-1-2". The bracketed remainders are the reasoning: a model that ends on (0) with one wrong remainder has
fooled itself (a "fudge"), and a critic has to check every step to see it.
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass

import numpy as np

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question

# A unique target is found within a few tries wherever there is one.
MAX_TRIES = 1000
_STEP = re.compile(r"([+-]\d+) \((-?\d+)\)")


@dataclass(frozen=True)
class Signs:
    """Questions with `terms` numbers each (a list: sizes in turn), every number between 1 and `largest`.

    `unique`: keep only targets that exactly one choice of signs reaches, all-plus and all-minus left out.
    """

    terms: tuple[int, ...]
    largest: int = 6
    unique: bool = False

    trace_kinds = ("right", "miss", "fudge")

    def draw(self, index: int, rng: random.Random) -> Question:
        terms = self.terms[index % len(self.terms)]
        for _ in range(MAX_TRIES):
            numbers = [rng.randint(1, self.largest) for _ in range(terms)]
            totals = _totals(numbers)
            targets, ways = np.unique(totals, return_counts=True)
            if self.unique:
                targets = targets[(ways == 1) & (abs(targets) != sum(numbers))]
            if len(targets):
                target = int(targets[rng.randrange(len(targets))])
                answers = frozenset(_answer(signs, numbers) for signs in _patterns(terms)[totals == target].tolist())
                return Question(f"{' '.join(map(str, numbers))} = ({target})", answers)
        raise UserError(f"no question of {terms} numbers up to {self.largest} has exactly one answer; raise largest")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: a solution. `miss`: honest arithmetic that does not end on 0. `fudge`: one false remainder makes it end on 0."""
        numbers, target = _read(question)
        solves = _totals(numbers) == target
        candidates = _patterns(len(numbers))[solves if kind == "right" or solves.all() else ~solves]
        signs = candidates[rng.randrange(len(candidates))].tolist()
        return _write(signs, numbers, target, slip_at=rng.randrange(len(numbers)) if kind == "fudge" else None)

    def extract(self, response: str) -> str | None:
        steps = _STEP.findall(response)
        is_complete = " ".join(f"{number} ({rest})" for number, rest in steps) == response.strip()
        return "".join(number for number, _ in steps) if steps and is_complete else None

    def vocabulary(self) -> list[str]:
        furthest = 2 * max(self.terms) * self.largest
        numbers = [str(n) for n in range(1, self.largest + 1)]
        return [
            "=",
            *numbers,
            *(s + n for s in "+-" for n in numbers),
            *(f"({r})" for r in range(-furthest, furthest + 1)),
        ]


@functools.cache
def _patterns(terms: int) -> np.ndarray:
    """Every choice of signs, [2 ** terms, terms]."""
    return np.array(list(itertools.product((1, -1), repeat=terms)))


def _totals(numbers: list[int]) -> np.ndarray:
    """What each choice of signs adds up to, [2 ** terms]."""
    return _patterns(len(numbers)) @ np.array(numbers)


def _answer(signs: list[int], numbers: list[int]) -> str:
    return "".join(f"{s * n:+d}" for s, n in zip(signs, numbers, strict=True))


def _read(question: Question) -> tuple[list[int], int]:
    numbers, target = str(question.content).split(" = ")
    return [int(n) for n in numbers.split()], int(target.strip("()"))


def _write(signs: list[int], numbers: list[int], target: int, slip_at: int | None = None) -> str:
    missed_by = target - sum(sign * number for sign, number in zip(signs, numbers, strict=True))
    rest, words = target, []
    for step, (sign, number) in enumerate(zip(signs, numbers, strict=True)):
        rest -= sign * number + (missed_by if step == slip_at else 0)
        words.append(f"{sign * number:+d} ({rest})")
    return " ".join(words)
