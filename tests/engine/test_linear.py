"""Equations, solved here by trying all numbers, and the steps of their solutions."""

import itertools
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.linear import Linear
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked


def side(text: str, **unknowns: int) -> int:
    """The value of "-x + 3y" or "2x - 4": coefficients are written before their unknown, 1 is left out."""
    total = 0
    for sign, digits, name in re.findall(r"([+-]?) ?(\d*)([xy]?)", text):
        if digits or name:
            total += int(f"{sign}{digits or 1}") * (unknowns[name] if name else 1)
    return total


def solutions(question: Question, within: int) -> list[str]:
    equations = [e.split(" = ") for e in asked(str(question.content)).removeprefix("Solve ")[:-2].split(" and ")]
    names = "xy" if len(equations) == 2 else "x"
    tried = itertools.product(range(-within, within + 1), repeat=len(names))
    found = []
    for values in tried:
        unknowns = dict(zip(names, values, strict=True))
        if all(side(left, **unknowns) == side(right, **unknowns) for left, right in equations):
            found.append(" ".join(map(str, values)))
    return found


def false_steps(trace: str) -> int:
    """How many of the written equalities between numbers do not hold."""
    count = 0
    for step in trace.split(" ; ")[:-1]:
        values = []
        for part in step.replace("x", "").split(" = "):
            numbers = re.findall(r"-?\d+", part)
            if re.fullmatch(r"(-?\d+) / (-?\d+)", part):
                values.append(int(numbers[0]) / int(numbers[1]))
            elif re.fullmatch(r"-?\d+ \* -?\d+ - -?\d+ \* -?\d+", part):
                a, b, c, d = map(int, numbers)
                values.append(a * b - c * d)
            elif re.fullmatch(r"-?\d+ - -?\d+", part):
                a, b = (int(n) for n in part.split(" - "))
                values.append(a - b)
            elif re.fullmatch(r"-?\d+", part):
                values.append(int(part))
        count += len(set(values)) > 1
    return count


def test_the_documented_traces_are_written() -> None:
    generator, rng = Linear(unknowns=(1, 2)), random.Random(0)
    one = Question(ask("Solve 3x + 4 = x - 2 .", "x = N"))
    assert generator.trace(one, "right", rng) == "3x - x = 2x ; -2 - 4 = -6 ; -6 / 2 = -3 ; Answer: x = -3"
    two = Question(ask("Solve 2x + y = 7 and x - y = 2 .", "x = N, y = N"))
    assert generator.trace(two, "right", rng) == (
        "2 * -1 - 1 * 1 = -2 - 1 = -3 ; 7 * -1 - 1 * 2 = -7 - 2 = -9 ; 2 * 2 - 7 * 1 = 4 - 7 = -3 ; "
        "-9 / -3 = 3 ; -3 / -3 = 1 ; Answer: x = 3, y = 1"
    )


@given(st.integers(0, 2**32), st.sampled_from([1, 2]), st.integers(1, 7))
@settings(deadline=None, max_examples=100)
def test_an_equation_has_the_one_solution_that_is_its_answer(seed: int, unknowns: int, largest: int) -> None:
    generator, rng = Linear((unknowns,), largest), random.Random(seed)
    question = generator.draw(0, rng)
    assert solutions(question, within=12) == list(question.answers)
    right, slip = (generator.trace(question, kind, rng) for kind in ("right", "slip"))
    assert score(generator.extract, right, question.answers) == 1
    assert score(generator.extract, slip, question.answers) == 0
    assert (false_steps(right), false_steps(slip)) == (0, 1)
    assert set(f"{question.content} {right} {slip}".split()) <= set(generator.vocabulary())
