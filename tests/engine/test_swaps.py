"""Questions about swapped cups and their worked responses, tracked here by moving letters in a list."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.swaps import Swaps

KINDS = ("right", "miss", "fudge")
EXAMPLE = Question("12 34 13 24 = cabd", frozenset({"+12-34+13-24"}))
SEEDS = st.integers(0, 2**32)


def drawn(generator: Swaps, count: int = 60) -> list[tuple[Question, random.Random]]:
    rng = random.Random(0)
    return [(generator.draw(index, rng), rng) for index in range(count)]


def listed(question: Question) -> tuple[list[str], str]:
    swaps, asked = str(question.content).split(" = ")
    return swaps.split(), asked


def after(order: str, signed_swap: str) -> str:
    """The order after one step such as "+13" (made) or "-13" (not made)."""
    sign, first, second = signed_swap[0], int(signed_swap[1]) - 1, int(signed_swap[2]) - 1
    cups = list(order)
    if sign == "+":
        cups[first], cups[second] = cups[second], cups[first]
    return "".join(cups)


def ends(swaps: list[str]) -> dict[str, str]:
    """Answer -> order at the end, of every choice of swaps."""
    found = {}
    for signs in itertools.product("+-", repeat=len(swaps)):
        signed = [sign + swap for sign, swap in zip(signs, swaps, strict=True)]
        order = "abcd"
        for step in signed:
            order = after(order, step)
        found["".join(signed)] = order
    return found


def solutions(question: Question) -> set[str]:
    swaps, asked = listed(question)
    return {answer for answer, order in ends(swaps).items() if order == asked}


def steps(response: str) -> list[tuple[str, str]]:
    """Signed swap and order of each step."""
    words = response.split()
    return list(zip(words[::2], words[1::2], strict=True))


def false_steps(response: str) -> int:
    """How many orders do not follow from the one before."""
    orders = ["abcd"] + [order for _, order in steps(response)]
    return sum(after(before, swap) != order for before, (swap, order) in zip(orders, steps(response), strict=False))


def test_the_documented_response_is_read_and_right():
    answer = Swaps(terms=(4,)).extract("+12 bacd -34 bacd +13 cabd -24 cabd")
    assert answer == "+12-34+13-24"
    assert EXAMPLE.answers == solutions(EXAMPLE) == {answer}


def test_the_documented_trace_is_written():
    trace = Swaps(terms=(4,)).trace(EXAMPLE, "right", random.Random(0))
    assert trace == "+12 bacd -34 bacd +13 cabd -24 cabd"


def test_one_swap_is_missed_by_leaving_it_and_fudged_by_writing_what_is_asked():
    question = Question("12 = bacd", frozenset({"+12"}))
    assert Swaps(terms=(1,)).trace(question, "miss", random.Random(0)) == "-12 abcd"
    assert Swaps(terms=(1,)).trace(question, "fudge", random.Random(0)) == "-12 bacd"


def test_two_swaps_can_be_missed_and_fudged_in_these_ways_only():
    question = Question("12 34 = bacd", frozenset({"+12-34"}))
    generator, rng = Swaps(terms=(2,)), random.Random(0)
    written = {kind: {generator.trace(question, kind, rng) for _ in range(200)} for kind in KINDS}
    assert written["right"] == {"+12 bacd -34 bacd"}
    assert written["miss"] == {"+12 bacd +34 badc", "-12 abcd +34 abdc", "-12 abcd -34 abcd"}
    false_first = {"+12 badc +34 bacd", "-12 badc +34 bacd", "-12 bacd -34 bacd"}
    false_second = {"+12 bacd +34 bacd", "-12 abcd +34 bacd", "-12 abcd -34 bacd"}
    assert written["fudge"] == false_first | false_second


@given(SEEDS, st.integers(2, 6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_trace_is_right_missed_or_fudged_as_asked(seed: int, terms: int, unique: bool):
    generator, rng = Swaps(terms=(terms,), unique=unique), random.Random(seed)
    question = generator.draw(0, rng)
    asked = listed(question)[1]
    for kind in KINDS:
        trace = generator.trace(question, kind, rng)
        assert score(generator.extract, trace, question.answers) == (kind == "right")
        assert false_steps(trace) == (kind == "fudge")
        assert (steps(trace)[-1][1] == asked) == (kind != "miss")
        assert [signed[1:] for signed, _ in steps(trace)] == listed(question)[0]
        assert set(f"{question.content} {trace}".split()) <= set(generator.vocabulary())


@given(SEEDS, st.integers(2, 7))
@settings(deadline=None, max_examples=30)
def test_a_question_knows_every_right_answer(seed: int, terms: int):
    question = Swaps(terms=(terms,)).draw(0, random.Random(seed))
    assert question.answers == solutions(question)


@pytest.mark.parametrize("terms", [2, 3, 4, 6])
def test_a_unique_question_has_exactly_one_answer_which_makes_some_swaps_and_leaves_some(terms: int):
    for question, _ in drawn(Swaps(terms=(terms,), unique=True)):
        (answer,) = solutions(question)
        assert question.answers == {answer}
        assert "+" in answer
        assert "-" in answer


def test_more_swaps_than_can_have_a_unique_answer_are_refused():
    with pytest.raises(UserError, match="no question of 7 swaps has exactly one answer; lower terms to 6 or less"):
        Swaps(terms=(7,), unique=True).draw(0, random.Random(0))


def test_no_swap_is_listed_twice_in_a_row():
    for question, _ in drawn(Swaps(terms=(10,)), 200):
        assert all(swap != following for swap, following in itertools.pairwise(listed(question)[0]))


def test_every_swap_and_every_order_is_asked_about():
    asked = [listed(question) for question, _ in drawn(Swaps(terms=(6,)), 300)]
    assert {swap for swaps, _ in asked for swap in swaps} == {"12", "13", "14", "23", "24", "34"}
    assert {order for _, order in asked} == {"".join(cups) for cups in itertools.permutations("abcd")}


def test_the_vocabulary_is_the_equals_sign_6_swaps_with_and_without_signs_and_24_orders():
    assert len(Swaps(terms=(4,)).vocabulary()) == 1 + 6 + 12 + 24


@pytest.mark.parametrize(
    "response",
    [
        "",
        "+12",
        "+12 bacd +34",
        "12 bacd",
        "+12 bacd 34 badc",
        "+12bacd",
        "+12  bacd",
        "+12 bacd+34 badc",
        "+12 bacd so +34 badc",
        "I say +12 bacd",
        "+12 bacd .",
        "+12 (bacd)",
        "+12 bac",
        "+12 bacda",
        "+12 bbcd",
        "+12 bace",
        "+21 bacd",
        "+11 abcd",
        "+15 abcd",
        "+ 12 bacd",
        "bacd +12",
    ],
)
def test_malformed_responses_have_no_answer(response: str):
    assert Swaps(terms=(4,)).extract(response) is None


@given(st.text() | st.lists(st.sampled_from(["+12", "bacd", "-34", "cabd", " ", "+", "12"])).map(" ".join))
@settings(deadline=None)
def test_extraction_reads_any_text_without_error(response: str):
    answer = Swaps(terms=(4,)).extract(response)
    assert answer is None or re.fullmatch(r"([+-]\d\d)+", answer)
