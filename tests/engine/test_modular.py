"""Remainders, computed here at once, and those of every step."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.modular import Modular
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked


def result(question: Question) -> int:
    text = asked(str(question.content))
    *numbers, modulus = map(int, re.findall(r"\d+", text))
    return (numbers[0] ** numbers[1] if "^" in text else sum(numbers)) % modulus


def false_steps(trace: str) -> int:
    steps = re.findall(r"(\d+) ([+*]) (\d+) = (\d+) = (\d+) mod (\d+)", trace)
    count = 0
    for a, sign, b, plain, remainder, modulus in steps:
        value = int(a) * int(b) if sign == "*" else int(a) + int(b)
        assert value == int(plain)
        assert int(remainder) < int(modulus)
        count += value % int(modulus) != int(remainder)
    return count


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("What is ( 15 + 8 + 11 ) mod 7 ?", "15 + 8 = 23 = 2 mod 7 ; 2 + 11 = 13 = 6 mod 7 ; Answer: 6"),
        ("What is 5 ^ 3 mod 7 ?", "5 * 5 = 25 = 4 mod 7 ; 4 * 5 = 20 = 6 mod 7 ; Answer: 6"),
    ],
)
def test_the_documented_traces_are_written(text: str, trace: str) -> None:
    assert Modular(terms=(3,)).trace(Question(ask(text, "N")), "right", random.Random(0)) == trace


@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(2, 30), st.sampled_from(["sum", "power", "either"]))
@settings(deadline=None, max_examples=100)
def test_answers_and_steps_are_right_and_a_slip_is_one_false_step(seed: int, terms: int, modulus: int, form) -> None:
    generator, rng = Modular((terms,), 25, modulus, form), random.Random(seed)
    question = generator.draw(0, rng)
    assert question.answers == {str(result(question))}
    right, slip = (generator.trace(question, kind, rng) for kind in ("right", "slip"))
    assert score(generator.extract, right, question.answers) == 1
    assert score(generator.extract, slip, question.answers) == 0
    assert (false_steps(right), false_steps(slip)) == (0, 1)
    assert set(f"{question.content} {right} {slip}".split()) <= set(generator.vocabulary())


def test_a_form_is_kept_to_and_either_draws_both() -> None:
    rng = random.Random(0)
    powers = {
        form: {"^" in str(Modular((3,), form=form).draw(i, rng).content) for i in range(50)}
        for form in ("sum", "power", "either")
    }
    assert powers == {"sum": {False}, "power": {True}, "either": {False, True}}
