"""Houses in a row and who and what is in each: a puzzle whose clues leave one solution, and none of them could be spared.

prompt    There are 2 houses in a row, numbered from the left, each with its own person (Ann, Bob) and drink (tea, milk).
          1. Bob is directly left of tea. End with "Answer: the person and drink of house 1, then of house 2".
response  1 : Ann 2 Bob 1 tea 2 milk 1 ; Answer: Bob milk, Ann tea

A response goes through the clues and writes down which houses became known.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

# A few tries find clues enough.
MAX_TRIES = 1000
MAX_CLUES = 24
CATEGORIES = {
    "person": ("Ann", "Bob", "Cid", "Dan"),
    "drink": ("tea", "milk", "juice", "water"),
    "pet": ("dog", "cat", "fish", "bird"),
    "colour": ("red", "blue", "green", "white"),
}

# What a clue says of the houses (numbers or arrays) of its first value and its second, which may be the number of a house.
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "{} is in house {}.": lambda a, b: a == b,
    "{} is not in house {}.": lambda a, b: a != b,
    "{} and {} are in the same house.": lambda a, b: a == b,
    "{} and {} are in different houses.": lambda a, b: a != b,
    "{} is directly left of {}.": lambda a, b: a + 1 == b,
    "{} is next to {}.": lambda a, b: abs(a - b) == 1,
}
_CLUE = re.compile(r"\d+\. ([^.]+\.)")
_PATTERNS = {form: re.compile(re.escape(form).replace(r"\{\}", r"(\w+)")) for form in FORMS}

# Form, first value, second value or number of a house.
Clue = tuple[str, str, str]


@dataclass(frozen=True)
class Zebra:
    """Puzzles of `sizes` (houses, attributes), both 2 to 4 (a list: sizes in turn)."""

    sizes: tuple[tuple[int, int], ...]

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        houses, attributes = size = self.sizes[index % len(self.sizes)]
        values, house_VA = _values(*size), _all_houses(*size)
        for _ in range(MAX_TRIES):
            truth = rng.randrange(house_VA.shape[1])
            where = dict(zip(values, house_VA[:, truth].tolist(), strict=True))
            clues = list(dict.fromkeys(_true_clue(where, houses, rng) for _ in range(MAX_CLUES)))
            kept = _thinned(clues, size)
            if kept:
                listed = " ".join(f"{number}. {form.format(a, b)}" for number, (form, a, b) in enumerate(kept, 1))
                question = ask(f"{_header(*size)} {listed}", _form(*size))
                return Question(question, frozenset({" ".join(_rows(where, houses)).lower()}))
        raise UserError(f"no puzzle of {houses} houses and {attributes} attributes was found")

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: what is known after each clue. `slip`: two values are taken for each other's houses throughout."""
        text = asked(str(question.content))
        size = int(text.split()[2]), text.count("(")
        values, alive_VA, told = _values(*size), _all_houses(*size), {}
        steps: list[dict[str, int]] = []
        for clue in map(_read, _CLUE.findall(text)):
            alive_VA = alive_VA[:, _holds(clue, values, alive_VA)]
            known_V = (alive_VA == alive_VA[:, :1]).all(axis=1)
            houses = zip(values, known_V.tolist(), alive_VA[:, 0].tolist(), strict=True)
            steps.append({value: house for value, is_known, house in houses if is_known and value not in told})
            told |= steps[-1]
        if kind == "slip":
            names = list(CATEGORIES.values())[rng.randrange(size[1])][: size[0]]
            one, other = rng.sample(names, 2)
            taken = {one: told[other], other: told[one]}
            steps = [{value: taken.get(value, house) for value, house in step.items()} for step in steps]
            told |= taken
        lines = [
            f"{n} : {' '.join(f'{v} {h}' for v, h in step.items()) or 'nothing'}" for n, step in enumerate(steps, 1)
        ]
        return " ; ".join([*lines, f"Answer: {', '.join(_rows(told, size[0]))}"])

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        texts = [ask(_header(*size), _form(*size)) for size in self.sizes]
        values = {value for size in self.sizes for value in _values(*size)}
        ends = [f"{value} {value}. {value}," for value in sorted(values)]
        numbers = [f"{n} {n}." for n in range(1, MAX_CLUES + 1)]
        return words_of([*texts, *(form.format("", "") for form in FORMS), *ends, *numbers, ": ; nothing Answer:"])


def _values(houses: int, attributes: int) -> list[str]:
    return [value for names in list(CATEGORIES.values())[:attributes] for value in names[:houses]]


@functools.cache
def _all_houses(houses: int, attributes: int) -> np.ndarray:
    """The house of every value in every possible arrangement, [values, (houses!) ** attributes]."""
    orders_PH = np.array(list(itertools.permutations(range(1, houses + 1))), dtype=np.int8)
    chosen_CA = np.indices((len(orders_PH),) * attributes).reshape(attributes, -1)
    return np.ascontiguousarray(orders_PH[chosen_CA].transpose(0, 2, 1).reshape(attributes * houses, -1))


def _true_clue(where: dict[str, int], houses: int, rng: random.Random) -> Clue:
    """Any clue that holds and says something: every form is as likely."""
    while True:
        form, (one, other) = rng.choice(list(FORMS)), rng.sample(list(where), 2)
        if "house {}" in form:
            other = str(rng.randint(1, houses))
        elif " and " in form and _category(one) == _category(other):
            continue
        if FORMS[form](where[one], where.get(other) or int(other)):
            return form, one, other


def _category(value: str) -> str:
    return next(category for category, names in CATEGORIES.items() if value in names)


def _holds(clue: Clue, values: list[str], house_VA: np.ndarray) -> np.ndarray:
    """In which of these arrangements a clue holds, [A]."""
    form, one, other = clue
    second = int(other) if other.isdigit() else house_VA[values.index(other)]
    return FORMS[form](house_VA[values.index(one)], second)


def _thinned(clues: list[Clue], size: tuple[int, int]) -> list[Clue]:
    """The clues without those that the others make superfluous; none when all of them leave more than one arrangement."""
    values, house_VA = _values(*size), _all_houses(*size)
    broken = {clue: (~_holds(clue, values, house_VA)).astype(np.int8) for clue in clues}
    broken_A = sum(broken.values())
    if np.count_nonzero(broken_A == 0) > 1:
        return []
    for clue in clues:
        without_A = broken_A - broken[clue]
        if np.count_nonzero(without_A == 0) == 1:
            broken_A = without_A
            del broken[clue]
    return list(broken)


def _read(sentence: str) -> Clue:
    for form, pattern in _PATTERNS.items():
        found = pattern.fullmatch(sentence)
        if found:
            return form, found[1], found[2]
    raise ValueError(f"no clue: {sentence}")


def _header(houses: int, attributes: int) -> str:
    chosen = list(CATEGORIES.items())[:attributes]
    listed = " and ".join(f"{category} ({', '.join(names[:houses])})" for category, names in chosen)
    return f"There are {houses} houses in a row, numbered from the left, each with its own {listed}."


def _form(houses: int, attributes: int) -> str:
    categories = " and ".join(list(CATEGORIES)[:attributes])
    return f"the {categories} of house 1, {', '.join(f'of house {h}' for h in range(2, houses + 1))}"


def _rows(where: dict[str, int], houses: int) -> list[str]:
    """What each house has, in the order of the categories."""
    order = [value for names in CATEGORIES.values() for value in names]
    return [" ".join(v for v in order if where.get(v) == house) for house in range(1, houses + 1)]
