"""Sums with the steps written out; the answer stands on the last line's "Answer:".

prompt    7 + 1 + 6 =
response  7 + 1 = 8 ; 8 + 6 = 14 ; Answer: 14
"""

import random
from dataclasses import dataclass

from tempo_engine.tasks.answers import answer_line
from tempo_engine.tasks.question import Question


@dataclass(frozen=True)
class Sums:
    """Sums of `terms` numbers each (a list: sizes in turn), every number between 0 and `largest`."""

    terms: tuple[int, ...]
    largest: int = 9

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        numbers = [rng.randint(0, self.largest) for _ in range(self.terms[index % len(self.terms)])]
        return Question(f"{' + '.join(map(str, numbers))} =", frozenset({str(sum(numbers))}))

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every step holds. `slip`: one step is off by one, and the rest follows from it."""
        numbers = [int(n) for n in str(question.content).removesuffix(" =").split(" + ")]
        slip_at = rng.randrange(1, len(numbers)) if kind == "slip" else None
        total, steps = numbers[0], []
        for step, number in enumerate(numbers[1:], 1):
            new_total = total + number + (1 if step == slip_at else 0)
            steps.append(f"{total} + {number} = {new_total}")
            total = new_total
        return " ; ".join([*steps, f"Answer: {total}"])

    def extract(self, response: str) -> str | None:
        return answer_line(response)

    def vocabulary(self) -> list[str]:
        return ["+", "=", ";", "Answer:", *map(str, range(max(self.terms) * self.largest + max(self.terms)))]
