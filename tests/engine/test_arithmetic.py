"""Expressions and their steps, evaluated here through Python's syntax tree."""

import ast
import operator
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.arithmetic import Arithmetic
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def expression(question: Question) -> str:
    return asked(str(question.content)).removeprefix("What is ").removesuffix(" ?")


def value(text: str) -> int:
    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return of(ast.parse(text, mode="eval").body)


def steps(trace: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(-?\d+) ([-+*]) (-?\d+) = (-?\d+)", trace)
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]


def holds(step: tuple[int, str, int, int]) -> bool:
    a, sign, b, c = step
    return {"+": a + b, "-": a - b, "*": a * b}[sign] == c


def test_the_documented_trace_is_written() -> None:
    question = Question(ask("What is 3 * ( 4 - 6 ) + 5 ?", "N"))
    trace = Arithmetic(terms=(4,)).trace(question, "right", random.Random(0))
    assert trace == "4 - 6 = -2 ; 3 * -2 = -6 ; -6 + 5 = -1 ; Answer: -1"


def test_without_brackets_products_come_first_and_the_rest_goes_from_left_to_right() -> None:
    question = Question(ask("What is 9 - 2 * 3 - 1 ?", "N"))
    trace = Arithmetic(terms=(4,)).trace(question, "right", random.Random(0))
    assert trace == "2 * 3 = 6 ; 9 - 6 = 3 ; 3 - 1 = 2 ; Answer: 2"


@given(st.integers(0, 2**32), st.integers(2, 7), st.sampled_from([1, 9, 40]))
@settings(deadline=None, max_examples=100)
def test_answers_and_steps_are_right_and_a_slip_is_one_false_step(seed: int, terms: int, largest: int) -> None:
    generator, rng = Arithmetic((terms,), largest, limit=200), random.Random(seed)
    question = generator.draw(0, rng)
    assert question.answers == {str(value(expression(question)))}
    right, slip = (generator.trace(question, kind, rng) for kind in ("right", "slip"))
    assert len(steps(right)) == len(steps(slip)) == terms - 1
    assert all(map(holds, steps(right)))
    assert sum(not holds(step) for step in steps(slip)) == 1
    assert score(generator.extract, right, question.answers) == 1
    assert score(generator.extract, slip, question.answers) == 0
    assert all(abs(c) <= 200 for *_, c in steps(right) + steps(slip))


def test_a_product_with_zero_does_not_hide_a_slip() -> None:
    generator, question = (
        Arithmetic(terms=(4,)),
        Question(ask("What is ( 2 + 3 ) * ( 4 - 4 ) ?", "N"), frozenset({"0"})),
    )
    rng = random.Random(0)
    assert all(
        not score(generator.extract, generator.trace(question, "slip", rng), question.answers) for _ in range(50)
    )


def test_brackets_stand_only_where_they_change_the_value() -> None:
    rng = random.Random(0)
    for index in range(200):
        text = expression(Arithmetic(terms=(4,)).draw(index, rng))
        for inner in re.findall(r"\( ([^()]+) \)", text):
            without = text.replace(f"( {inner} )", inner)
            assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(text))


def test_too_low_a_limit_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="no expression of 10 numbers up to 999 stays within 1; raise limit"):
        Arithmetic((10,), 999, limit=1).draw(0, random.Random(1))
