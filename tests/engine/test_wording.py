"""Questions in words end with how to answer, and answers that mean the same are read as the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tempo_engine.tasks.answers import MAX_ANSWER_CHARS
from tempo_engine.tasks.wording import answer_words, ask, asked, folded, words_of


def test_a_prompt_ends_with_how_to_answer() -> None:
    prompt = ask("What is 1 + 1 ?", "N")
    assert prompt == 'What is 1 + 1 ? End with "Answer: N".'
    assert asked(prompt) == "What is 1 + 1 ?"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so\nAnswer: Valid.", "valid"),
        ("**Answer: knight, knave**", "knight knave"),
        ("Answer: Knight; Knave", "knight knave"),
        ("Answer: x = 3, y = -4", "3 -4"),
        ("Answer: x=3,y=-4", "3 -4"),
        ("Answer: x = 1,000", "1000"),
        ("Answer: 1,000", "1000"),
        ("Answer: $007$", "7"),
        ("Answer: 26 March 2024", "26 march 2024"),
        ("Answer: Ann tea, Bob milk", "ann tea bob milk"),
        ("Answer: 1 no, Answer: 2", "2"),
        ("Answer: ,", None),
        ("Answer:", None),
        ("valid", None),
        ("", None),
    ],
)
def test_one_answer_is_read_from_many_spellings(response: str, answer: str | None) -> None:
    assert answer_words(response) == answer


@given(st.text() | st.text().map("Answer: {}".format))
def test_any_text_is_read_without_error(response: str) -> None:
    answer = answer_words(response)
    assert answer is None or 0 < len(answer) <= MAX_ANSWER_CHARS


@given(st.integers())
def test_an_integer_is_folded_to_itself(number: int) -> None:
    assert folded(f"{number:,}") == str(number)


def test_words_are_listed_once_in_order() -> None:
    assert words_of(["b a", "a c b"]) == ["b", "a", "c"]
