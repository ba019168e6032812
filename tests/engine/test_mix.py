"""Several generators in one set: whose turn it is, whose traces are written, how responses are read."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.dates import Dates
from tempo_engine.tasks.few_shot import FewShot
from tempo_engine.tasks.gym import Gym
from tempo_engine.tasks.knights import Knights
from tempo_engine.tasks.mix import Mix
from tempo_engine.tasks.question import Generator, Question, draw_questions
from tempo_engine.tasks.signs import Signs
from tempo_engine.tasks.sums import Sums
from tempo_engine.tasks.swaps import Swaps
from tempo_engine.tasks.syllogism import Syllogism

EVERYTHING = Mix(
    (Sums((2, 3)), Signs((3,)), Swaps((4,)), Knights((3,)), Syllogism((3,)), Dates((30,))), weights=(3, 1, 1, 1, 1, 1)
)


@dataclass(frozen=True)
class Sizes(Sums):
    """Says which index it was asked for."""

    def draw(self, index: int, rng: random.Random) -> Question:
        return Question(str(index))


@pytest.mark.parametrize(
    ("weights", "turns"),
    [((1, 1), [0, 1, 0, 1, 0, 1]), ((2, 1), [0, 1, 0, 0, 1, 0]), ((1, 1, 4), [2, 0, 1, 2, 2, 2]), ((3,), [0] * 6)],
)
def test_turns_follow_the_weights(weights: tuple[int, ...], turns: list[int]) -> None:
    mix = Mix((Sums((2,)),) * len(weights), weights)
    drawn = [mix.draw(index, random.Random(index)).part for index in range(6)]
    assert Counter(drawn) == Counter(turns)
    if weights in ((1, 1), (2, 1)):
        assert drawn == turns


def test_each_generator_counts_its_own_questions_so_that_its_sizes_take_turns() -> None:
    mix = Mix((Sizes((2,)), Sizes((2,))), weights=(2, 1))
    drawn = [(q.part, q.content) for q in (mix.draw(index, random.Random(0)) for index in range(6))]
    assert sorted(drawn) == [(0, "0"), (0, "1"), (0, "2"), (0, "3"), (1, "0"), (1, "1")]


def test_a_question_s_own_generator_writes_its_traces_and_the_mix_reads_them() -> None:
    rng = random.Random(0)
    for question in draw_questions(EVERYTHING, "labelled", 48, seed=0, where="data"):
        own = EVERYTHING.generators[question.part]
        assert EVERYTHING.trace(question, "right", random.Random(1)) == own.trace(question, "right", random.Random(1))
        for kind in own.trace_kinds:
            trace = EVERYTHING.trace(question, kind, rng)
            assert EVERYTHING.extract(trace) == own.extract(trace)
            assert score(EVERYTHING.extract, trace, question.answers) == (kind == "right")


def test_a_mix_writes_the_kinds_of_traces_that_all_of_it_write() -> None:
    assert EVERYTHING.trace_kinds == ("right",)
    assert Mix((Sums((2,)), Knights((2,))), (1, 1)).trace_kinds == ("right", "slip")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: Knight, knave", "knight knave"),
        ("+3 (2) +5 (-3)", "+3+5"),
        ("+12 bacd", "+12"),
        ("7", None),
        ("", None),
    ],
)
def test_a_response_is_read_without_its_question(response: str, answer: str | None) -> None:
    assert EVERYTHING.extract(response) == answer


def test_a_mix_knows_the_words_of_all_or_of_none() -> None:
    mix = Mix((Sums((2,)), Knights((2,))), (1, 1))
    assert set(mix.vocabulary() or ()) == {*Sums((2,)).vocabulary(), *Knights((2,)).vocabulary()}
    open_end: tuple[Generator, ...] = (Sums((2,)), Gym("chain_sum"))
    assert Mix(open_end, (1, 1)).vocabulary() is None


def test_worked_questions_of_a_mix_come_from_all_of_it() -> None:
    shown = FewShot(Mix((Sums((2,)), Knights((2,))), (1, 1)), shots=2)
    first, second = shown.worked
    assert "+" in str(first.content)
    assert "Knights" in str(second.content)
    question = shown.draw(0, random.Random(0))
    assert question.shown.count("Answer: ") == 3, "two of worked responses, one in the question of knights"
