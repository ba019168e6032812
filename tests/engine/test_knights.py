"""Knights and knaves, judged here by trying everybody as either."""

import itertools
import random
import re

import pytest
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.knights import Knights
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked

EXAMPLE = Question(
    ask(
        "Knights always tell the truth, knaves always lie. Ann says: Bob is a knave. Bob says: Ann and Bob are alike. "
        "What are Ann, Bob?",
        "knight or knave for each, in this order",
    )
)


def statements(question: Question) -> dict[str, str]:
    return dict(re.findall(r"(\w+) says: ([\w ]+)\.", asked(str(question.content))))


def fits(kinds: dict[str, str], said: dict[str, str]) -> bool:
    for name, statement in said.items():
        if found := re.fullmatch(r"(\w+) is a (\w+)", statement):
            is_true = kinds[found[1]] == found[2]
        else:
            found = re.fullmatch(r"(\w+) and (\w+) (are alike|differ)", statement)
            assert found
            is_true = (kinds[found[1]] == kinds[found[2]]) == (found[3] == "are alike")
        if is_true != (kinds[name] == "knight"):
            return False
    return True


def solutions(question: Question) -> list[str]:
    said = statements(question)
    tried = itertools.product(("knight", "knave"), repeat=len(said))
    return [" ".join(kinds) for kinds in tried if fits(dict(zip(said, kinds, strict=True)), said)]


def test_the_documented_puzzle_is_solved_as_documented() -> None:
    trace = Knights(people=(2,)).trace(EXAMPLE, "right", random.Random(0))
    assert trace == "knight knight : not Ann ; knight knave : fits ; Answer: knight, knave"
    assert solutions(EXAMPLE) == ["knight knave"]


def test_a_slip_takes_what_does_not_fit() -> None:
    generator, rng = Knights(people=(2,)), random.Random(0)
    slips = {generator.trace(EXAMPLE, "slip", rng) for _ in range(200)}
    assert "knight knight : fits ; Answer: knight, knight" in slips
    # Ann the knave says what is false of a knight, as she should: only Bob's "alike" is odd. With two knaves it is Ann.
    passed_over = "knight knight : not Ann ; knight knave : not Ann"
    assert f"{passed_over} ; knave knight : fits ; Answer: knave, knight" in slips
    assert f"{passed_over} ; knave knight : not Bob ; knave knave : fits ; Answer: knave, knave" in slips


@pytest.mark.parametrize("people", [2, 3, 4, 5, 6])
def test_a_puzzle_has_the_one_solution_that_is_its_answer(people: int) -> None:
    generator, rng = Knights((people,)), random.Random(people)
    for index in range(15):
        question = generator.draw(index, rng)
        assert len(statements(question)) == people
        assert solutions(question) == list(question.answers)
        for kind in generator.trace_kinds:
            assert score(generator.extract, generator.trace(question, kind, rng), question.answers) == (kind == "right")
