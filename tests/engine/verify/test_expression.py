"""Mathematical equality: what strings decide, what goes to the pool, and how an answer may not be hedged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import boxed, canonical
from tempo_engine.verify.expression import Expression, settle, spelled
from tempo_engine.verify.pool import Pair, Pool


class Recorded(Pool):
    """Finds every pair equal, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[Pair] = []

    def compare(self, pairs):  # type: ignore[no-untyped-def]
        self.asked += pairs
        return [1.0] * len(pairs)


def rewards(pool: Pool, gold: str | tuple[str, ...], *texts: str) -> list[float]:
    answers = frozenset(map(canonical, (gold,) if isinstance(gold, str) else gold))
    item = Labelled(Prompt("q", "", (5,)), answers)
    responses = [Rollout(item.prompt, [2], [-1.0], ((0, 1),), False, text) for text in texts]
    return Expression(boxed, pool).rewards(responses, [item] * len(texts))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac{2}{4}"),
        ("1/2", "0.5"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("42", "x = 42"),
        ("42", r"6 \cdot 7 = 42"),
        ("x + 1", "1 + x"),
        ("(1, 2)", r"\left( 1,\, 2 \right)"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        (r"\text{Paris}", "paris"),
        ("3^{10}", "59049"),
    ],
)
def test_what_is_equal_is_right(shared_pool: Pool, gold: str, answer: str):
    assert rewards(shared_pool, gold, rf"\boxed{{{answer}}}") == [1.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "41 = 42"),
        ("42", "x = 41 = 42"),
        ("42", "41 or 42"),
        ("42", r"41 \text{ or } 42"),
        ("42", "41, 42"),
        ("42", "41; 42"),
        ("42", "41 42"),
        ("42", "not 42"),
        ("42", r"\neq 42"),
        ("42", "x > 42"),
        ("42", r"42 \pm 1"),
        ("42", r"x \in \{41, 42\}"),
        (r"\frac{1}{3}", "0.333"),
        ("Paris", "Pairs"),
        ("Paris", "siraP"),
        ("x", "y"),
    ],
)
def test_what_is_not_equal_is_wrong(shared_pool: Pool, gold: str, answer: str):
    assert rewards(shared_pool, gold, rf"\boxed{{{answer}}}") == [0.0]


def test_integers_words_and_equal_strings_never_reach_the_pool():
    pool = Recorded()
    assert rewards(pool, "42", r"\boxed{+042}", r"\boxed{41}", "no box") == [1.0, 0.0, 0.0]
    assert rewards(pool, "Paris", r"\boxed{London}") == [0.0]
    assert rewards(pool, r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}") == [1.0]
    assert pool.asked == []


def test_any_of_several_right_answers_will_do():
    pool = Recorded()
    assert rewards(pool, ("7", "x + 1"), r"\boxed{7}", r"\boxed{1 + x}", r"\boxed{8}") == [1.0, 1.0, 1.0]
    assert pool.asked == [("1 + x", "7"), ("1 + x", "x + 1"), ("8", "x + 1")], "what strings settle is not asked"


def test_every_side_of_a_numeric_equation_must_be_right():
    assert settle("41 = 42", "42") == [("41 ", "42"), (" 42", "42")]
    assert settle("x = 42", "42") == [(" 42", "42")]
    assert settle("x = 1, y = 2", "42") == [("x = 1, y = 2", "42")]
    assert settle("y = 2x", "y = x + x") == [("y = 2x", "y = x + x")]


def test_votes_count_one_spelling_of_spaces_and_fractions():
    verifier = Expression(boxed, Recorded())
    assert verifier.extract(r"\boxed{\left(1,\,\tfrac12\right)}") == r"(1,\frac12)"
    assert verifier.extract(r"\boxed{\leftarrow}") == r"\leftarrow"
    assert verifier.extract("nothing") is None


@given(st.text(alphabet="\\leftdfrac{}()12x, $") | st.text())
@settings(deadline=None)
def test_the_spelling_of_a_spelling_is_the_same(text: str):
    assert spelled(spelled(spelled(text))) == spelled(spelled(text))


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
@settings(deadline=None, max_examples=25)
def test_the_quick_way_of_integers_agrees_with_the_library(shared_pool: Pool, a: int, b: int):
    assert shared_pool.compare([(str(a), str(b)), (str(a), str(a))]) == [float(a == b), 1.0]
    assert settle(str(a), str(b)) == ([] if a == b else None)
