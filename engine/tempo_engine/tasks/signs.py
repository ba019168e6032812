"""Signs to target: put a sign before each number so that they add up to the target. One wrong step spoils the answer.

    prompt    3 5 1 2 = (5)
    response  +3 (2) +5 (-3) -1 (-2) -2 (0)

Each step is a signed number and, in brackets, what is still missing: 5 - 3 = 2, 2 - 5 = -3, -3 + 1 = -2, -2 + 2 = 0. The answer is the
signed numbers, "+3+5-1-2". The bracketed remainders are the reasoning: a model that ends on (0) with one wrong remainder has fooled
itself (a "fudge"), and a critic has to check every step to see it.
"""

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass

from tempo_engine.tasks.question import Question

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
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(terms)]
            reached = Counter(_total(signs, numbers) for signs in _patterns(terms))
            if not self.unique:
                target = rng.choice(sorted(reached))
                break
            extreme = sum(numbers)
            targets = sorted(t for t, ways in reached.items() if ways == 1 and abs(t) != extreme)
            if targets:
                target = rng.choice(targets)
                break
        answers = frozenset(_answer(s, numbers) for s in _patterns(terms) if _total(s, numbers) == target)
        return Question(f"{' '.join(map(str, numbers))} = ({target})", answers)

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: a solution. `miss`: honest arithmetic that does not end on 0. `fudge`: the same with one false remainder, so that
        it does end on 0."""
        numbers, target = _read(question)
        solving = {s for s in _patterns(len(numbers)) if _total(s, numbers) == target}
        wrong = [s for s in _patterns(len(numbers)) if s not in solving]
        if kind == "right" or not wrong:
            return _write(rng.choice(sorted(solving)), numbers, target)
        signs = rng.choice(wrong)
        slip = rng.randrange(len(numbers)) if kind == "fudge" else None
        return _write(signs, numbers, target, slip_at=slip)

    def extract(self, response: str) -> str | None:
        steps = _STEP.findall(response)
        is_complete = " ".join(f"{number} ({rest})" for number, rest in steps) == response.strip()
        return "".join(number for number, _ in steps) if steps and is_complete else None

    def vocabulary(self) -> list[str]:
        furthest = 2 * max(self.terms) * self.largest
        numbers = [str(n) for n in range(1, self.largest + 1)]
        return ["=", *numbers, *(s + n for s in "+-" for n in numbers), *(f"({r})" for r in range(-furthest, furthest + 1))]


def _patterns(terms: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=terms))


def _total(signs: tuple[int, ...], numbers: list[int]) -> int:
    return sum(s * n for s, n in zip(signs, numbers, strict=True))


def _answer(signs: tuple[int, ...], numbers: list[int]) -> str:
    return "".join(f"{s * n:+d}" for s, n in zip(signs, numbers, strict=True))


def _read(question: Question) -> tuple[list[int], int]:
    numbers, target = str(question.content).split(" = ")
    return [int(n) for n in numbers.split()], int(target.strip("()"))


def _write(signs: tuple[int, ...], numbers: list[int], target: int, slip_at: int | None = None) -> str:
    rest, words = target, []
    for step, (sign, number) in enumerate(zip(signs, numbers, strict=True)):
        rest -= sign * number
        if step == slip_at:
            rest -= target - _total(signs, numbers)
        words.append(f"{sign * number:+d} ({rest})")
    return " ".join(words)
