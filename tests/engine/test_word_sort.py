"""Words in order, and lists that grow by one word at a step."""

import random

import pytest
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.word_sort import WORDS, WordSort
from tempo_engine.tasks.wording import ask, asked

EXAMPLE = Question(ask("Sort in alphabetical order: pear fig apple .", "the words"), frozenset({"apple fig pear"}))


def test_the_documented_trace_is_written() -> None:
    trace = WordSort(words=(3,)).trace(EXAMPLE, "right", random.Random(0))
    assert trace == "pear ; fig pear ; apple fig pear ; Answer: apple fig pear"


def test_a_slip_puts_one_word_elsewhere() -> None:
    rng = random.Random(0)
    slips = {WordSort(words=(3,)).trace(EXAMPLE, "slip", rng) for _ in range(100)}
    assert slips == {
        "pear ; pear fig ; apple pear fig ; Answer: apple pear fig",
        "pear ; fig pear ; fig apple pear ; Answer: fig apple pear",
        "pear ; fig pear ; fig pear apple ; Answer: fig pear apple",
    }


@pytest.mark.parametrize("count", [2, 5, 20])
def test_the_answer_is_the_words_in_order(count: int) -> None:
    generator, rng = WordSort((count,)), random.Random(0)
    for index in range(30):
        question = generator.draw(index, rng)
        words = asked(str(question.content)).removeprefix("Sort in alphabetical order: ").removesuffix(" .").split()
        assert len(set(words)) == count
        assert question.answers == {" ".join(sorted(words))}
        for kind in generator.trace_kinds:
            assert score(generator.extract, generator.trace(question, kind, rng), question.answers) == (kind == "right")


def test_the_words_are_different_and_plain() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(word.isalpha() and word.islower() and word.isascii() for word in WORDS)
