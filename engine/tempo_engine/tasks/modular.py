"""Sums and powers modulo a number, reduced at every step.

prompt    What is ( 15 + 8 + 11 ) mod 7 ? End with "Answer: N".
response  15 + 8 = 23 = 2 mod 7 ; 2 + 11 = 13 = 6 mod 7 ; Answer: 6

prompt    What is 5 ^ 3 mod 7 ? End with "Answer: N".
response  5 * 5 = 25 = 4 mod 7 ; 4 * 5 = 20 = 6 mod 7 ; Answer: 6
"""

import random
import re
from dataclasses import dataclass
from typing import Literal

from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of


@dataclass(frozen=True)
class Modular:
    """Sums of `terms` numbers, or powers with that exponent (a list: sizes in turn), modulo 2 to `modulus`.

    Numbers of a sum are up to `largest`, bases of a power less than the modulus. `form`: one of the two, or either.
    """

    terms: tuple[int, ...]
    largest: int = 20
    modulus: int = 12
    form: Literal["sum", "power", "either"] = "either"

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        terms, modulus = self.terms[index % len(self.terms)], rng.randint(2, self.modulus)
        form = rng.choice(("sum", "power")) if self.form == "either" else self.form
        if form == "sum":
            numbers = [rng.randint(1, self.largest) for _ in range(terms)]
            text, result = f"( {' + '.join(map(str, numbers))} )", sum(numbers) % modulus
        else:
            base = rng.randint(1, modulus - 1)
            text, result = f"{base} ^ {terms}", pow(base, terms, modulus)
        return Question(ask(f"What is {text} mod {modulus} ?", "N"), frozenset({str(result)}))

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every step holds. `slip`: one remainder is off by one, and the rest follows from it to a wrong end."""
        text = asked(str(question.content))
        *numbers, modulus = map(int, re.findall(r"\d+", text))
        sign = "*" if "^" in text else "+"
        if sign == "*":
            base, exponent = numbers
            numbers = [base] * exponent
        right, steps = _steps(numbers, sign, modulus)
        if kind == "slip":
            # Multiplying can hide a slip; at the last step it always shows.
            places = rng.sample(range(len(numbers) - 1), len(numbers) - 1)
            by = rng.choice((1, modulus - 1))
            steps = next(s for end, s in (_steps(numbers, sign, modulus, at, by) for at in places) if end != right)
        return " ; ".join(steps)

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        step = self.largest + max(self.largest, self.modulus)
        furthest = max(step, self.modulus**2, *self.terms)
        return words_of([ask("What is ( + ) ^ * mod ?", "N"), "= ; Answer:", *map(str, range(furthest + 1))])


def _steps(numbers: list[int], sign: str, modulus: int, slip_at: int = -1, slip: int = 0) -> tuple[int, list[str]]:
    """The result and the steps, the last of which is the answer; the remainder of step `slip_at` is off by `slip`."""
    total, steps = numbers[0], []
    for step, number in enumerate(numbers[1:]):
        value = total * number if sign == "*" else total + number
        remainder = (value + (slip if step == slip_at else 0)) % modulus
        steps.append(f"{total} {sign} {number} = {value} = {remainder} mod {modulus}")
        total = remainder
    return total, [*steps, f"Answer: {total}"]
