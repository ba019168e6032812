"""Linear equations with an integer solution, in one unknown or two.

prompt    Solve 3x + 4 = x - 2 . End with "Answer: x = N".
response  3x - x = 2x ; -2 - 4 = -6 ; -6 / 2 = -3 ; Answer: x = -3

prompt    Solve 2x + y = 7 and x - y = 2 . End with "Answer: x = N, y = N".
response  2 * -1 - 1 * 1 = -2 - 1 = -3 ; 7 * -1 - 1 * 2 = -7 - 2 = -9 ; 2 * 2 - 7 * 1 = 4 - 7 = -3 ;
          -9 / -3 = 3 ; -3 / -3 = 1 ; Answer: x = 3, y = 1

Two unknowns are solved with the three determinants of the coefficients (Cramer's rule).
"""

import random
import re
from dataclasses import dataclass

from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

_SIDE = re.compile(r"(-?\d*)x ([+-]) (\d+)")
_EQUATION = re.compile(r"(-?\d*)x ([+-]) (\d*)y = (-?\d+)")
FORMS = {1: "x = N", 2: "x = N, y = N"}


@dataclass(frozen=True)
class Linear:
    """Equations in `unknowns` unknowns, 1 or 2 (a list: in turn); coefficients and solutions are up to `largest` away from 0."""

    unknowns: tuple[int, ...]
    largest: int = 5

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        return self._one(rng) if self.unknowns[index % len(self.unknowns)] == 1 else self._two(rng)

    def _one(self, rng: random.Random) -> Question:
        a, b = self._coefficient(rng), self._coefficient(rng)
        within = range(-self.largest, self.largest + 1)
        # No side without a number, and none without an x.
        c = rng.choice([c for c in (*within, -self.largest - 1) if c not in (0, a)])
        x = rng.choice([x for x in within if (a - c) * x + b != 0])
        equation = f"{_times(a)}x {_plus(b)} = {_times(c)}x {_plus((a - c) * x + b)}"
        return Question(ask(f"Solve {equation} .", FORMS[1]), frozenset({str(x)}))

    def _two(self, rng: random.Random) -> Question:
        a, b, c, d = (self._coefficient(rng) for _ in range(4))
        while a * d == b * c:
            a, b, c, d = (self._coefficient(rng) for _ in range(4))
        x, y = (rng.randint(-self.largest, self.largest) for _ in range(2))
        first, second = (f"{_times(p)}x {_plus_y(q)} = {p * x + q * y}" for p, q in ((a, b), (c, d)))
        return Question(ask(f"Solve {first} and {second} .", FORMS[2]), frozenset({f"{x} {y}"}))

    def _coefficient(self, rng: random.Random) -> int:
        return rng.choice((-1, 1)) * rng.randint(1, self.largest)

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every step holds. `slip`: one step is wrong, so that one unknown comes out wrong by 1."""
        slip = (rng.choice((-1, 1)), rng.random() < 0.5) if kind == "slip" else (0, False)
        equations = asked(str(question.content))
        return (
            _trace_two(equations, *slip, of_x=rng.random() < 0.5)
            if " and " in equations
            else _trace_one(equations, *slip)
        )

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        # The largest determinant, with a slip; the largest constant of one equation, with a slip.
        large = self.largest + 1
        furthest = 2 * large**3 if 2 in self.unknowns else 2 * large**2
        numbers = [str(n) for n in range(-furthest, furthest + 1)]
        named = [_times(n) + name for name in "xy" for n in range(-2 * large, 2 * large + 1) if n]
        texts = [ask("Solve + - * / = and ; .", form) for form in FORMS.values()]
        return words_of([*texts, "Answer: x = y =", *numbers, *(f"{n}," for n in range(-large, large + 1)), *named])


def _times(n: int) -> str:
    """A coefficient as it is written before its unknown: 3, -3, nothing for 1, - for -1."""
    return {1: "", -1: "-"}.get(n, str(n))


def _plus(n: int) -> str:
    return f"+ {n}" if n >= 0 else f"- {-n}"


def _plus_y(n: int) -> str:
    return f"{'+' if n > 0 else '-'} {_times(abs(n))}y"


def _number(coefficient: str) -> int:
    return int({"": "1", "-": "-1"}.get(coefficient, coefficient))


def _trace_one(equation: str, slip: int, is_early: bool) -> str:
    """ax + b = cx + d: x is off by `slip`, from the constants on (early) or in the division."""
    (a, b), (c, d) = ((_number(x), int(sign + n)) for x, sign, n in _SIDE.findall(equation))
    constant = d - b + (slip * (a - c) if is_early else 0)
    x = (d - b) // (a - c) + slip
    steps = [
        f"{_times(a)}x - {_times(c)}x = {_times(a - c)}x",
        f"{d} - {b} = {constant}",
        f"{constant} / {a - c} = {x}",
    ]
    return " ; ".join([*steps, f"Answer: x = {x}"])


def _trace_two(equations: str, slip: int, is_early: bool, *, of_x: bool) -> str:
    """ax + by = e and cx + dy = f: x or y is off by `slip`, from its determinant on (early) or in its division."""
    rows = [(_number(x), _number(y) * int(f"{sign}1"), int(n)) for x, sign, y, n in _EQUATION.findall(equations)]
    (a, b, e), (c, d, f) = rows
    steps, found = [], []
    bottom = a * d - b * c
    for p, q, r, s, is_off in ((a, d, b, c, False), (e, d, b, f, of_x), (a, f, e, c, not of_x)):
        value = p * q - r * s + (slip * bottom if is_off and is_early else 0)
        steps.append(f"{p} * {q} - {r} * {s} = {p * q} - {r * s} = {value}")
        found.append((value, (p * q - r * s) // bottom + (slip if is_off else 0)))
    (_, (top_x, x), (top_y, y)) = found
    steps += [f"{top_x} / {bottom} = {x}", f"{top_y} / {bottom} = {y}"]
    return " ; ".join([*steps, f"Answer: x = {x}, y = {y}"])
