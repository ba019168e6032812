"""Puzzles of houses, solved here by placing one category after the other."""

import itertools
import random
import re
from collections.abc import Callable, Iterator

import pytest
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked
from tempo_engine.tasks.zebra import Zebra

Where = dict[str, int]
EXAMPLE = Question(
    ask(
        "There are 2 houses in a row, numbered from the left, each with its own person (Ann, Bob) and drink (tea, milk). "
        "1. Bob is directly left of tea.",
        "the person and drink of house 1, of house 2",
    )
)


def puzzle(question: Question) -> tuple[list[list[str]], list[str]]:
    """The values of each category, and the clues."""
    text = asked(str(question.content))
    return [names.split(", ") for names in re.findall(r"\(([^)]+)\)", text)], re.findall(r"\d+\. ([^.]+)\.", text)


def check(clue: str) -> tuple[set[str], Callable[[Where], bool]]:
    """The values that a clue is about, and whether it holds."""
    first, words = clue.split()[0], clue.split()
    last = words[-1]
    if re.fullmatch(r"\w+ is in house \d", clue):
        return {first}, lambda where: where[first] == int(last)
    if re.fullmatch(r"\w+ is not in house \d", clue):
        return {first}, lambda where: where[first] != int(last)
    if clue.endswith("are in the same house"):
        return {first, words[2]}, lambda where: where[first] == where[words[2]]
    if clue.endswith("are in different houses"):
        return {first, words[2]}, lambda where: where[first] != where[words[2]]
    if " is directly left of " in clue:
        return {first, last}, lambda where: where[last] - where[first] == 1
    assert " is next to " in clue
    return {first, last}, lambda where: abs(where[last] - where[first]) == 1


def arrangements(categories: list[list[str]], checks: list, where: Where) -> Iterator[Where]:
    if not categories:
        yield where
        return
    for order in itertools.permutations(range(1, len(categories[0]) + 1)):
        placed = where | dict(zip(categories[0], order, strict=True))
        if all(holds(placed) for values, holds in checks if values <= placed.keys()):
            yield from arrangements(categories[1:], checks, placed)


def solutions(categories: list[list[str]], clues: list[str]) -> list[str]:
    found = []
    for where in arrangements(categories, [check(clue) for clue in clues], {}):
        houses = range(1, len(categories[0]) + 1)
        rows = [next(v for v in names if where[v] == house) for house in houses for names in categories]
        found.append(" ".join(rows).lower())
    return found


def test_the_documented_puzzle_is_solved_as_documented() -> None:
    assert solutions(*puzzle(EXAMPLE)) == ["bob milk ann tea"]
    trace = Zebra(sizes=((2, 2),)).trace(EXAMPLE, "right", random.Random(0))
    assert trace == "1 : Ann 2 Bob 1 tea 2 milk 1 ; Answer: Bob milk, Ann tea"


def test_a_slip_takes_two_values_for_each_other() -> None:
    rng = random.Random(0)
    slips = {Zebra(sizes=((2, 2),)).trace(EXAMPLE, "slip", rng) for _ in range(50)}
    assert slips == {
        "1 : Ann 1 Bob 2 tea 2 milk 1 ; Answer: Ann milk, Bob tea",
        "1 : Ann 2 Bob 1 tea 1 milk 2 ; Answer: Bob tea, Ann milk",
    }


@pytest.mark.parametrize("size", list(itertools.product((2, 3, 4), repeat=2)))
def test_a_puzzle_has_one_solution_and_no_clue_to_spare(size: tuple[int, int]) -> None:
    generator, rng = Zebra((size,)), random.Random(0)
    for index in range(5 if size == (4, 4) else 10):
        question = generator.draw(index, rng)
        categories, clues = puzzle(question)
        assert (len(categories[0]), len(categories)) == size
        assert solutions(categories, clues) == list(question.answers)
        spared = rng.randrange(len(clues))
        assert len(solutions(categories, clues[:spared] + clues[spared + 1 :])) > 1
        for kind in generator.trace_kinds:
            trace = generator.trace(question, kind, rng)
            assert score(generator.extract, trace, question.answers) == (kind == "right")
            assert trace.count(" : ") == len(clues)


def test_what_a_trace_calls_known_is_the_same_in_all_that_fits_the_clues_so_far() -> None:
    generator, rng = Zebra(sizes=((3, 2),)), random.Random(1)
    for index in range(10):
        question = generator.draw(index, rng)
        categories, clues = puzzle(question)
        known: Where = {}
        for number, step in enumerate(generator.trace(question, "right", rng).split(" ; ")[:-1], 1):
            known |= {value: int(house) for value, house in re.findall(r"([A-Za-z]+) (\d)", step)}
            fitting = list(arrangements(categories, [check(clue) for clue in clues[:number]], {}))
            agreed = {v: h for v, h in fitting[0].items() if all(where[v] == h for where in fitting)}
            assert known == agreed
